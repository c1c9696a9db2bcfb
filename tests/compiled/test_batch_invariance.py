"""R3 on the C++ target and the shipped checkpoint; 500 trials run in tests/nightly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.compiled.conftest import Load
from tests.compiled.invariance import check, facts

EXAMPLE = Path(__file__).parents[2] / "examples/shakespeare"
PROMPT = [int(t) for t in range(7, 7 + 3 * 43, 3)]  # 43 tokens: two pages of 16 and a part


def test_logprobs_are_bitwise_the_same_whatever_happens_around(load: Load) -> None:
    """The default sizes, which are those of the benchmarks."""
    model = load(EXAMPLE, dtype="auto", max_num_seqs=16, max_num_batched_tokens=512, num_threads=1)
    counts = check(model, PROMPT, 20)
    assert counts["num_cached_tokens"] > 100 and counts["num_preemptions"] > 5
    assert counts["swapped"] > 20


def test_freed_window_pages_are_never_read(load: Load) -> None:
    """Pages that left the window of 7 are given back and poisoned, and nobody notices."""
    model = load("mistral_window", max_num_seqs=4, num_threads=1)
    core, runner = model.engine._core, model.runner
    assert core.state.options.window_tokens == 7 and runner is not None
    fields = {"max_tokens": 40, "temperature": 0.8, "seed": 3, "logprobs": 2, "ignore_eos": True}
    prompts = [[5, 6, 7, 8] * 9, [9, 8, 7]]
    windowed = core.state.options
    core.state.options = replace(windowed, window_tokens=None, enable_prefix_caching=False)
    expected = [facts(output) for output in model.generate(prompts, **fields)]
    core.state.options = windowed
    plain, num_free = core.step, []

    def poisoning() -> None:
        runner.poison_pages([0, *core.state.pool.free])
        plain()
        num_free.append(sum(s.num_dropped for s in core.state.running))

    core.step = poisoning  # type: ignore[method-assign]
    found = [facts(output) for output in model.generate(prompts, **fields)]
    core.step = plain  # type: ignore[method-assign]
    assert found == expected and max(num_free) >= 4
