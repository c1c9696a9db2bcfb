"""Random programs: compiled equals eager, judged by float64. `make nightly` runs 5,000 of them.

FUZZ_EXAMPLES, FUZZ_SEED and FUZZ_FIRST choose them, as `aios fuzz` does. FUZZ_REPORT names a folder
for the counts of each part, as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from aios_compile.cli.output import plain
from aios_compile.study.fuzz.campaign import Tally, passes_of, run_campaign

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
PARTS = 4
LEAST = 50  # examples that each pass fires on, of 5,000


def report(tally: Tally, part: int) -> None:
    folder = os.environ.get("FUZZ_REPORT")
    if folder:
        path = Path(folder) / f"fuzz_{SEED}_{FIRST}_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {**plain(tally), "contexts": dict(tally.contexts)}
        path.write_text(json.dumps(found, indent=2))
    print(json.dumps(plain(tally)))


@pytest.mark.parametrize("part", range(PARTS))
def test_compiled_equals_eager(
    part: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Parts can run side by side: each takes every fourth example."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    tally = run_campaign(
        range(FIRST + part, FIRST + EXAMPLES, PARTS),
        seed=SEED,
        objects=shared / "fuzz-objects",
        say=print,
        scripts=Path(os.environ.get("FUZZ_REPORT", tmp_path)) / "failures",
    )
    report(tally, part)
    assert not tally.failures, tally.failures
    assert not tally.refused, tally.refused
    wanted = LEAST * tally.examples // 5000
    rare = {name: tally.fired[name] for name in passes_of("cpp") if tally.fired[name] < wanted}
    assert not rare, f"passes that fired on fewer than {wanted} of {tally.examples}: {rare}"
