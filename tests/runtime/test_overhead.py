"""What the runtime itself costs a step. Host-bound decode is trap 18."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aios_compile.runtime.batch import Batch, Limits, StepResult
from aios_compile.runtime.engine import Engine


class NullExecutor:
    """Returns constants at once."""

    usable = True

    def __init__(self) -> None:
        self.limits = Limits(512, 64, 64, 512, 8192, 16, 4096, 1000)
        self._ids = np.ones(64, np.int64)
        self._floats = np.zeros(64, np.float32)
        self._tops = np.zeros((64, 20), np.int64), np.zeros((64, 20), np.float32)
        self._logits = np.zeros((64, 8), np.float32)

    def step(self, batch: Batch) -> StepResult:
        rows = batch.num_rows
        ids, floats = self._ids[:rows], self._floats[:rows]
        tops = (top[:rows] for top in self._tops)
        return StepResult(ids, floats, ids, *tops, ids, self._logits[:rows])

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass

    def close(self) -> None:
        pass


def host_us_per_step(num_prompts: int, num_tokens: int) -> float:
    with Engine(NullExecutor()) as engine:
        engine.generate([[1, 2, 3]] * num_prompts, max_tokens=num_tokens)
        return (engine.stats.step_us - engine.stats.executor_us) / engine.stats.num_steps


def test_a_decode_step_costs_little() -> None:
    """26 us at batch 1, 110 us at 64 on a 2-core Zen 4 machine; a busy one gets more."""
    one, many = (min(host_us_per_step(n, 100) for _ in range(3)) for n in (1, 64))
    print(f"{one:.0f} us at batch 1, {many:.0f} us at 64")
    assert one < 200 and many < 2000


def test_arrays_keep_their_place_from_step_to_step() -> None:
    """An executor may bind the addresses once, but for the lists of ids."""
    seen: dict[str, set[int]] = {}
    executor = NullExecutor()
    plain = executor.step

    def watching(batch: Batch) -> StepResult:
        for name, value in vars(batch).items():
            seen.setdefault(name, set()).add(value.ctypes.data)
        return plain(batch)

    executor.step = watching  # type: ignore[method-assign]
    with Engine(executor) as engine:
        engine.generate([[1, 2, 3]] * 5, max_tokens=20, repetition_penalty=1.5)
        engine.generate([[1] * 700], max_tokens=2, logit_bias={5: 1.0})
    moved = {name for name, places in seen.items() if len(places) > 1}
    assert moved <= {"penalty_ids", "penalty_counts", "bias_ids", "bias_values", "allowed_ids"}
