"""Run the tests group by group with a time budget each, and hold their number to the pinned one.

A group is a folder of tests, or `unit` for the files beside this one. tests/expected_counts.txt
has a line `group run skipped` for each: a test that vanished, or is skipped now, fails the run.

    python tests/run_groups.py                    all groups
    python tests/run_groups.py codegen runtime    some of them
    python tests/run_groups.py --update-counts    pin what was counted
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
COUNTS = TESTS / "expected_counts.txt"
DEFAULT_BUDGET_SECONDS = 60
# Groups that need longer; all together take 15 minutes on 2 cores.
BUDGET_SECONDS = {
    "unit": 60,
    "codegen": 180,
    "compiled": 180,
    "foreign": 150,
    "fuzz": 120,
    "passes": 120,
}
# These need what most machines lack; they run in `make gpu` or `make nightly`.
LEFT_OUT = ("gpu", "nightly", "goldens")


class Result(NamedTuple):
    """What one group did. `passed` and `failed` were run; errors count as failed.

    `lacking` of the skipped need instructions that this processor lacks: they count as run, so
    that the pinned counts hold on every machine.
    """

    passed: int
    failed: int
    skipped: int
    seconds: float
    lacking: int = 0

    @property
    def counted(self) -> tuple[int, int]:
        return self.passed + self.failed + self.lacking, self.skipped - self.lacking


def groups() -> dict[str, list[Path]]:
    """Return the paths of each group, in the order in which they run."""
    found = {"unit": sorted(TESTS.glob("test_*.py"))}
    for folder in sorted(path for path in TESTS.iterdir() if path.is_dir()):
        if folder.name not in LEFT_OUT and any(folder.rglob("test_*.py")):
            found[folder.name] = [folder]
    return found


def budget_of(group: str) -> int:
    """Return the seconds that a group may take on 2 cores."""
    return BUDGET_SECONDS.get(group, DEFAULT_BUDGET_SECONDS)


def run(paths: list[Path], workers: int) -> Result:
    """Run pytest on `paths` and count from its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        command += ["-n", str(workers)] if workers > 1 else []
        begin = time.monotonic()
        status = subprocess.run([*command, *map(str, paths)], cwd=TESTS.parent, check=False)
        seconds = time.monotonic() - begin
        if not report.exists():
            return Result(0, 1, 0, seconds)
        root = ElementTree.parse(report).getroot()
        reasons = [skip.get("message", "") for skip in root.iter("skipped")]
        lacking = sum(reason.startswith("the processor lacks") for reason in reasons)
        suites = root.iter("testsuite")
        totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        for suite in suites:
            for name in totals:
                totals[name] += int(suite.get(name, "0"))
    failed = totals["failures"] + totals["errors"]
    if status.returncode not in (0, 5) and not failed:
        failed = 1  # pytest itself broke, or was interrupted
    passed = totals["tests"] - totals["failures"] - totals["errors"] - totals["skipped"]
    return Result(passed, failed, totals["skipped"], seconds, lacking)


def read_counts() -> dict[str, tuple[int, int]]:
    """Return {group: (run, skipped)} as pinned."""
    lines = COUNTS.read_text().splitlines() if COUNTS.exists() else []
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    return {name: (int(count), int(skipped)) for name, count, skipped in rows}


def write_counts(counts: dict[str, tuple[int, int]]) -> None:
    rows = [f"{name} {count} {skipped}" for name, (count, skipped) in sorted(counts.items())]
    head = "# group run skipped; written by tests/run_groups.py --update-counts"
    COUNTS.write_text("\n".join([head, *rows]) + "\n")


def main() -> int:
    """Run the groups that were asked for; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the tests group by group.")
    parser.add_argument("groups", nargs="*", help="names of groups; none runs all")
    parser.add_argument("--workers", type=int, default=1, help="processes in each group")
    parser.add_argument("--update-counts", action="store_true", help="pin what was counted")
    chosen = parser.parse_args()
    known, pinned = groups(), read_counts()
    unknown = set(chosen.groups) - set(known)
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; the groups are {', '.join(known)}")
    results: dict[str, Result] = {}
    for name in chosen.groups or known:
        print(f"== {name} (budget {budget_of(name)} s)", flush=True)
        results[name] = run(known[name], chosen.workers)
    if chosen.update_counts:
        kept = {name: count for name, count in pinned.items() if name in known}
        pinned = {**kept, **{name: result.counted for name, result in results.items()}}
        write_counts(pinned)
    return summarise(results, pinned)


def summarise(results: dict[str, Result], pinned: dict[str, tuple[int, int]]) -> int:
    """Print a line a group and the closing line; return 0 if all passed and the counts hold."""
    print("\ngroup            passed failed skipped   seconds / budget")
    moved = []
    for name, result in results.items():
        budget = budget_of(name)
        late = "  over budget" if result.seconds > budget else ""
        row = f"{result.passed:6} {result.failed:6} {result.skipped:7}"
        print(f"{name:<16} {row} {result.seconds:9.1f} / {budget}{late}")
        if pinned.get(name) != result.counted:
            moved.append(f"{name}: ran and skipped {result.counted}, pinned {pinned.get(name)}")
    for line in moved:
        print(f"count moved: {line} (--update-counts if that is meant)")
    totals = [sum(getattr(r, part) for r in results.values()) for part in Result._fields[:3]]
    seconds = sum(result.seconds for result in results.values())
    print(f"{seconds:.0f} s in all")
    print(f"{totals[0]} passed, {totals[1]} failed, {totals[2]} skipped")
    return 1 if totals[1] or moved else 0


if __name__ == "__main__":
    sys.exit(main())
