"""R3 on the C++ target and the shipped checkpoint; 500 trials run in tests/nightly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compiled.conftest import Load
from tests.compiled.invariance import check, check_freed_window_pages
from tests.compiled.test_quantized import DEFAULT_SIZES

EXAMPLE = Path(__file__).parents[2] / "examples/shakespeare"
PROMPT = [int(t) for t in range(7, 7 + 3 * 43, 3)]  # 43 tokens: two pages of 16 and a part


@pytest.mark.usefixtures("as_shipped")
def test_logprobs_are_bitwise_the_same_whatever_happens_around(load: Load) -> None:
    """The default sizes, which are those of the benchmarks."""
    model = load(EXAMPLE, **DEFAULT_SIZES)
    counts = check(model, PROMPT, 20)
    assert counts["num_cached_tokens"] > 100 and counts["num_preemptions"] > 5
    assert counts["swapped"] > 20


def test_freed_window_pages_are_never_read(load: Load) -> None:
    """Pages that left the window of 7 are given back and poisoned, and nobody notices."""
    model = load("mistral_window", max_num_seqs=4, num_threads=1)
    assert max(check_freed_window_pages(model)) >= 4
