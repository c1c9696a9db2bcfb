"""An answer does not depend on its neighbours: tokens equal, logprobs bitwise equal.

Whatever the batch, the cuts of a prompt into chunks, the pages, preemption, or the threads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from aios_compile import SamplingParams
from aios_compile.compiled_model import CompiledModel
from aios_compile.runtime.events import Commit, Schedule
from aios_compile.runtime.program_runner import state_page_bytes
from tests.compiled.conftest import Load
from tests.quick_builds import build_quickly

pytestmark = pytest.mark.usefixtures("as_shipped")
NAME = "qwen3_layer_types"  # windows of 16 tokens, and full attention
WIDE = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
NARROW = {"max_num_batched_tokens": 9, "max_num_seqs": 5}


def requests(seed: int = 3) -> tuple[list[list[int]], list[SamplingParams]]:
    """Return prompts of many lengths, greedy and sampled, with penalties and logprobs."""
    rng = random.Random(seed)
    lengths = (1, 3, 15, 16, 17, 31, 33, 40, 2, 48)
    prompts = [[rng.randrange(128) for _ in range(n)] for n in lengths]
    params = [
        SamplingParams(
            max_tokens=rng.randint(5, 24),
            temperature=(0.0, 0.7, 1.3)[i % 3],
            seed=i,
            logprobs=4,
            top_p=(1.0, 0.9)[i % 2],
            top_k=(0, 20)[i % 2],
            repetition_penalty=(1.0, 1.2)[i // 2 % 2],
            prompt_logprobs=2 if i % 4 == 1 else None,
        )
        for i in range(len(prompts))
    ]
    return prompts, params


def answers(outputs: Sequence[Any]) -> list[Any]:
    """Return all that a caller sees, floats as they are: == is bitwise on them."""
    return [
        (
            [(o.token_ids, o.finish_reason, o.logprobs) for o in output.outputs],
            output.prompt_logprobs,
        )
        for output in outputs
    ]


def alone(model: CompiledModel) -> list[Any]:
    prompts, params = requests()
    found = []
    for prompt, given in zip(prompts, params):
        found += answers(model.generate([prompt], given))
    return found


def poison_free_pages(model: CompiledModel) -> list[int]:
    """Fill the trash page and all free pages with NaN before each step; return the counts."""
    core, runner, counts = model.engine._core, model.runner, []
    assert runner is not None
    advance = core._advance

    def poisoned(event: Any) -> Any:
        plan = advance(event)
        core.state.check_integrity()
        if isinstance(event, (Schedule, Commit)):
            written = core._ahead.pages  # which the next plan is expected to take
            runner.poison_pages([0, *(p for p in core.state.pool.free if p not in written)])
            counts.append(len(core.state.pool.free))
        return plan

    core._advance = poisoned  # type: ignore[method-assign]
    return counts


def few_pages(model: CompiledModel, num_pages: int) -> int:
    return sum(state_page_bytes(model.program)) * (num_pages + 1)


_EXPECTED: list[Any] = []


@pytest.fixture
def expected(load: Load) -> list[Any]:
    """The answers of single requests, no step begun ahead, computed once a process."""
    if not _EXPECTED:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AIOS_OVERLAP", "0")
            _EXPECTED.extend(alone(load(NAME, **WIDE)))
    return _EXPECTED


def test_mixed_batches_give_the_answers_of_single_requests(load: Load, expected: list[Any]) -> None:
    prompts, params = requests()
    for options in (WIDE, NARROW):
        model = load(NAME, **options)
        counts = poison_free_pages(model)
        assert answers(model.generate(prompts, params)) == expected
        assert alone(model) == expected  # and alone in small chunks
        assert counts


def test_quick_builds_have_the_bits_of_the_shipped_ones(
    load: Load, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tests build models with less optimisation: see tests/quick_builds.py."""
    shipped = load(NAME, **WIDE).artefact_path
    build_quickly(monkeypatch)
    quick = load(NAME, **WIDE)
    assert quick.artefact_path != shipped
    assert alone(quick) == expected


def test_preemption_is_invisible(load: Load, expected: list[Any]) -> None:
    prompts, params = requests()
    wide = load(NAME, **WIDE)
    chunk = WIDE["max_num_batched_tokens"]  # prompts begin at once and meet in a full pool
    few = few_pages(wide, 7)
    model = load(NAME, **WIDE, kv_cache_memory_bytes=few, chunked_prefill_size=chunk)
    assert model.limits.num_pages == 8
    poison_free_pages(model)
    assert answers(model.generate(prompts, params)) == expected
    assert model.engine.stats.num_preemptions > 0


def test_threads_give_the_same_bits(load: Load, expected: list[Any]) -> None:
    prompts, params = requests()
    one, two = load(NAME, **WIDE, num_threads=1), load(NAME, **WIDE, num_threads=2)
    assert one.runner is not None and two.runner is not None
    assert (one.runner.num_threads, two.runner.num_threads) == (1, 2)
    assert answers(two.generate(prompts, params)) == expected
    ids = prompts[-1]
    assert np.array_equal(one(ids).numpy(), two(ids).numpy())


def test_steps_begun_ahead_give_the_same_bits(load: Load, expected: list[Any]) -> None:
    model = load(NAME, **WIDE)
    poison_free_pages(model)
    prompts, params = requests()
    assert answers(model.generate(prompts, params)) == alone(model) == expected
    assert model.engine.stats.num_steps_ahead > 10, model.engine.stats


def test_completions_of_one_prompt(load: Load) -> None:
    """n completions share the prompt's pages; each is what a request with its seed gives."""
    model = load(NAME, **NARROW)
    poison_free_pages(model)
    prompt = list(range(40))
    given = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "logprobs": 1, "ignore_eos": True}
    several = model.generate([prompt], n=4, **given)[0]
    first = model.generate([prompt], n=1, **given)[0]
    assert len({tuple(o.token_ids) for o in several.outputs}) == 4
    assert answers([first])[0][0][0] == answers([several])[0][0][0]
    again = load(NAME, **WIDE).generate([prompt, prompt[:7]], n=4, **given)[0]
    assert answers([again]) == answers([several])
    greedy = model.generate([prompt], n=3, temperature=0, max_tokens=6)[0]
    assert len({tuple(o.token_ids) for o in greedy.outputs}) == 1


def test_the_cut_of_a_prompt_does_not_change_its_logits(load: Load) -> None:
    ids = [7 * i % 128 for i in range(61)]
    wide, narrow = load(NAME, **WIDE), load(NAME, **NARROW)
    whole = wide(ids).numpy()
    assert np.array_equal(whole, narrow(ids).numpy())
    for length in (1, 16, 17):
        assert np.array_equal(whole[:length], wide(ids[:length]).numpy())
