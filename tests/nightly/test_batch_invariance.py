"""R3: 500 of 500, on the shipped checkpoint, in the configurations that are benchmarked.

Steps are begun ahead where the engine thinks that it pays, and once more wherever they can be.
"""

from __future__ import annotations

import pytest

import aios_compile
from tests.compiled.invariance import check
from tests.compiled.test_batch_invariance import EXAMPLE, PROMPT

CHOSEN = [(form, 2, "1") for form in (None, "int8", "int4")]
AHEAD = [(form, threads, "2") for form in (None, "int8") for threads in (1, 2)]


@pytest.mark.parametrize(("quantization", "num_threads", "overlap"), CHOSEN + AHEAD)
def test_500_of_500(
    quantization: str | None, num_threads: int, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOS_OVERLAP", overlap)
    with aios_compile.load_and_compile(
        EXAMPLE,
        quantization=quantization,
        num_threads=num_threads,
        max_num_seqs=16,
        progress=False,
    ) as model:
        counts = check(model, PROMPT, 500)
        num_ahead = model.engine.stats.num_steps_ahead
    assert counts["num_cached_tokens"] > 1000 and counts["num_preemptions"] > 100
    assert num_ahead > 5000 if overlap == "2" else num_ahead >= 0
