"""R3: 500 of 500, on the shipped checkpoint."""

from __future__ import annotations

import aios_compile
from tests.compiled.invariance import check
from tests.compiled.test_batch_invariance import EXAMPLE, PROMPT


def test_500_of_500() -> None:
    with aios_compile.load_and_compile(EXAMPLE, progress=False) as model:
        counts = check(model, PROMPT, 500)
    assert counts["num_cached_tokens"] > 1000 and counts["num_preemptions"] > 100
