"""Whole tiny models as Triton kernels in the interpreter: prefill, chunks, decode and mixtures."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.interpreted.harness import assert_close, batch, model

STEPS = (
    [(0, 5), (0, 2)],  # two prompts, padded to the bucket of eight
    [(5, 1), (2, 4), (0, 3)],  # a decode, a later chunk, a new prompt
    [(6, 1), (6, 1), (3, 1)],  # decodes, padded to the bucket of four
)


def check(name: str, dtype: str, tolerance: float) -> None:
    """Run the steps on both; the first sequence then goes on from a copy of its page."""
    built = model(name, dtype)
    ours, eager = built.executor(), built.eager()
    for number, sequences in enumerate(STEPS):
        given = batch(sequences, seed=number)
        assert_close(ours.step(given), eager.step(given), tolerance)
    assert set(ours.graphs) == {8, 4}
    for executor in (ours, eager):
        executor.copy_pages([(1, 20)])
    assert_close(*(e.step(batch([(7, 1)], first_page=20)) for e in (ours, eager)), tolerance)


def test_steps_are_those_of_eager() -> None:
    check("qwen3_gqa", "float32", 1e-5)
