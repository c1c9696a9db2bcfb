"""R4 on the shipped checkpoint: a request is put aside before each of its steps, in both ways."""

from __future__ import annotations

from typing import Any

import pytest

import aios_compile
from aios_compile.runtime.events import Preempt
from tests.compiled.invariance import SUBJECT, facts
from tests.compiled.test_batch_invariance import EXAMPLE, PROMPT

NEIGHBOUR = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("how", ["swap", "recompute"])
@pytest.mark.parametrize(
    ("quantization", "num_threads", "overlap"),
    [(None, 1, "2"), (None, 2, "2"), (None, 2, "0"), ("int8", 2, "2"), ("int4", 2, "1")],
)
def test_preempted_at_every_step(
    quantization: str | None, num_threads: int, overlap: str, how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before one step, for each of them; of the later ones, before every fourth from there on."""
    monkeypatch.setenv("AIOS_OVERLAP", overlap)
    with aios_compile.load_and_compile(
        EXAMPLE,
        quantization=quantization,
        num_threads=num_threads,
        max_num_batched_tokens=32,
        progress=False,
    ) as model:
        core = model.engine._core
        fields: list[Any] = [model.sampling_defaults.params(**SUBJECT)] * 2
        expected = [facts(model.generate(p, **SUBJECT)) for p in (PROMPT, NEIGHBOUR)]
        plain, number, at, num_preempted = core.step, 0, 0, 0

        def step() -> None:
            nonlocal number, num_preempted
            if number == at or (number > at and number % 4 == at % 4 and at >= LAST // 2):
                for state in list(core.state.running):
                    core._advance(Preempt(state.sequence_id, how))
                    num_preempted += 1
            number += 1
            plain()

        core.step = step  # type: ignore[method-assign]
        for at in range(LAST):
            number = 0
            found = [facts(o) for o in model.generate([PROMPT, NEIGHBOUR], fields)]
            assert found == expected, f"preempted before step {at}"
            core.state.check_integrity()
        core.step = plain  # type: ignore[method-assign]
    assert num_preempted > 2 * LAST


LAST = 22  # steps of the two requests: two of their prompts, twenty tokens
