"""R3: 500 of 500, on the shipped checkpoint, in the configurations that are benchmarked."""

from __future__ import annotations

import pytest

import aios_compile
from tests.compiled.invariance import check
from tests.compiled.test_batch_invariance import EXAMPLE, PROMPT


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_500_of_500(quantization: str | None) -> None:
    with aios_compile.load_and_compile(
        EXAMPLE, quantization=quantization, num_threads=2, max_num_seqs=16, progress=False
    ) as model:
        counts = check(model, PROMPT, 500)
    assert counts["num_cached_tokens"] > 1000 and counts["num_preemptions"] > 100
