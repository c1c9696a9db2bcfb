"""PyTorch's samples of every operator that the compiler knows; what is refused is listed.

make test takes one sample of every ninth operator; make nightly eight of each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("expecttest")

from aios_compile.ir.ops import TABLE
from aios_compile.study.fuzz.opinfo import SEMANTIC, Counts, operators, run_operator

NIGHTLY = int(os.environ.get("FUZZ_EXAMPLES", "200")) >= 5000
SAMPLES, EVERY, PARTS = (8, 1, 6) if NIGHTLY else (1, 9, 1)
MOST_REFUSED = 0.15  # of the operators; each by a typed error, and listed


def test_the_op_table_is_covered_where_torch_has_samples() -> None:
    known = operators()
    assert len(known) >= 130
    assert set(SEMANTIC) <= set(known) and set(SEMANTIC.values()) <= set(TABLE)


@pytest.mark.parametrize("part", range(PARTS))
def test_samples_of_torch(part: int, tmp_path: Path) -> None:
    known, counts = operators(), Counts()
    for name in sorted(known)[part :: max(EVERY, PARTS)]:
        run_operator(known[name], counts, tmp_path / "objects", SAMPLES)
    print(f"{sum(counts.right.values())} samples of {len(counts.right)} operators are right")
    for name, reasons in counts.refused.items():
        print(f"refused: {name}: {dict(reasons)}")
    assert not counts.failures, counts.failures
    tried = len(counts.right) + len(counts.refused)
    assert len(counts.refused) <= max(2, MOST_REFUSED * tried), counts.refused
