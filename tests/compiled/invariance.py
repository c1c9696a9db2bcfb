"""One request among random neighbours, chunk cuts, cache hits, preemptions and swaps (R3)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import aios_compile
from aios_compile.runtime.events import MemoryPressure, Preempt
from aios_compile.runtime.outputs import RequestOutput

SUBJECT = {"max_tokens": 20, "temperature": 0.9, "seed": 11, "logprobs": 4, "ignore_eos": True}


def facts(output: RequestOutput) -> tuple[Any, ...]:
    """Return the tokens and every log-probability, as the floats that they are."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    rows = [[(i, p.logprob, p.rank) for i, p in row.items()] for row in completion.logprobs]
    return (completion.token_ids, rows, completion.cumulative_logprob, completion.finish_reason)


class Trial:
    """Random circumstances for one run of the subject on the model's own engine."""

    def __init__(self, model: aios_compile.CompiledModel, prompt: list[int], seed: int) -> None:
        self.rng = random.Random(seed)
        self.model, self.prompt, self.core = model, prompt, model.engine._core
        self.counts: dict[str, int] = {}

    def run(self) -> tuple[Any, ...]:
        """Return the subject's facts; the engine is left as it was."""
        core, rng = self.core, self.rng
        state, plain = core.state, core.step
        limits, options = state.limits, state.options
        tokens = rng.choice([16, 19, 64, limits.max_num_batched_tokens])
        state.limits = replace(limits, max_num_batched_tokens=tokens)
        state.options = replace(options, chunked_prefill_size=rng.choice([None, 5, 33]))
        core.step = lambda: self._step(plain)  # type: ignore[method-assign]
        try:
            if rng.random() < 0.5:
                cut = rng.randint(1, len(self.prompt))
                self.model.generate(self.prompt[:cut], max_tokens=rng.randint(1, 30))
            return self._among_neighbours()
        finally:
            core.step = plain  # type: ignore[method-assign]
            state.limits, state.options = limits, options

    def _among_neighbours(self) -> tuple[Any, ...]:
        rng = self.rng
        prompts, params = [], []
        defaults = self.model.sampling_defaults
        for _ in range(rng.randint(0, 12)):
            shared = self.prompt[: rng.choice([0, 0, rng.randint(1, len(self.prompt))])]
            own = [rng.randrange(1000) for _ in range(rng.randint(1, 60))]
            prompts.append([*shared, *own])
            fields = {"max_tokens": rng.randint(1, 30), "n": rng.choice([1, 1, 2])}
            params.append(defaults.params(**fields, temperature=rng.choice([0.0, 1.0])))
        place = rng.randint(0, len(prompts))
        prompts.insert(place, self.prompt)
        params.insert(place, defaults.params(**SUBJECT))
        output = self.model.generate(prompts, params)[place]
        found = output.metrics
        for name in ("num_cached_tokens", "num_preemptions"):
            self.counts[name] = self.counts.get(name, 0) + getattr(found, name)
        return facts(output)

    def _step(self, plain: Any) -> None:
        core, rng = self.core, self.rng
        if rng.random() < 0.1 and core.state.running:
            how = rng.choice(["swap", "recompute"])
            plan = core._advance(Preempt(rng.choice(core.state.running).sequence_id, how))
            self.counts["swapped"] = self.counts.get("swapped", 0) + len(plan.swap_outs)
        if rng.random() < 0.05:
            core._advance(MemoryPressure(core.state.limits.num_pages))
            core._advance(MemoryPressure(0))
        plain()


def check(model: aios_compile.CompiledModel, prompt: list[int], num_trials: int) -> dict[str, int]:
    """Compare `num_trials` runs with the first one, alone in a fresh engine; return the counts."""
    alone = facts(model.generate(prompt, **SUBJECT))
    total: dict[str, int] = {}
    for seed in range(num_trials):
        trial = Trial(model, prompt, seed)
        assert trial.run() == alone, f"trial {seed} differs"
        model.engine._core.state.check_integrity()
        for name, count in trial.counts.items():
            total[name] = total.get(name, 0) + count
    return total


def check_freed_window_pages(model: aios_compile.CompiledModel) -> list[int]:
    """Poison the pages that left a window of 7 before each step: the answers are those of a run
    that keeps them. Return how many were given back at each step.
    """
    core, runner = model.engine._core, model.runner
    assert core.state.options.window_tokens == 7 and runner is not None
    fields = {"max_tokens": 40, "temperature": 0.8, "seed": 3, "logprobs": 2, "ignore_eos": True}
    prompts = [[5, 6, 7, 8] * 9, [9, 8, 7]]
    windowed = core.state.options
    core.state.options = replace(windowed, window_tokens=None, enable_prefix_caching=False)
    expected = [facts(output) for output in model.generate(prompts, **fields)]
    core.state.options = windowed
    plain, num_free = core.step, list[int]()

    def poisoning() -> None:
        written = core._ahead.pages  # which the next plan is expected to take
        runner.poison_pages([0, *(p for p in core.state.pool.free if p not in written)])
        plain()
        num_free.append(sum(s.num_dropped for s in core.state.running))

    core.step = poisoning  # type: ignore[method-assign]
    found = [facts(output) for output in model.generate(prompts, **fields)]
    core.step = plain  # type: ignore[method-assign]
    assert found == expected
    return num_free
