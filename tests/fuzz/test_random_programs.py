"""Random programs: compiled equals eager, judged by float64. `make nightly` runs 5,000 of them.

FUZZ_EXAMPLES, FUZZ_SEED and FUZZ_FIRST choose them, as `aios fuzz` does: a long campaign can be
run in pieces. FUZZ_REPORT names a folder for the counts of each part, as JSON, which
study/fuzz/report.py adds up.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aios_compile.study.fuzz.campaign import run_campaign
from aios_compile.study.fuzz.report import rare
from tests.conftest import shared_folder
from tests.fuzz.parts import write_part

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_compiled_equals_eager(
    part: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Parts can run side by side: each takes every fourth example."""
    tally = run_campaign(
        range(FIRST + part, FIRST + EXAMPLES, PARTS),
        seed=SEED,
        objects=shared_folder(tmp_path_factory) / "fuzz-objects",
        say=print,
        scripts=Path(os.environ.get("FUZZ_REPORT", tmp_path)) / "failures",
    )
    write_part(tally, FIRST, part)
    assert not tally.failures, tally.failures
    # What has no kernel is refused by name: rare shapes of what no model does (docs/nightly.md).
    assert sum(tally.refused.values()) <= max(3, tally.examples // 100), tally.refused
    if tally.examples >= 500:  # of few, by chance, none
        assert not rare("cpp", tally.fired, tally.examples)
