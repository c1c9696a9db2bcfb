"""Run the tests group by group with a time budget each, and hold their number to the pinned one.

A group is a folder of tests, or `unit` for the files beside this one. tests/expected_counts.txt
has a line `group run skipped` for each: a test that vanished, or is skipped now, fails the run.

    python tests/run_groups.py                    all groups
    python tests/run_groups.py codegen runtime    some of them
    python tests/run_groups.py --types            and mypy --strict beside them
    python tests/run_groups.py --update-counts    pin what was counted
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
COUNTS = TESTS / "expected_counts.txt"
TOTAL_SECONDS = 720
TOLERANCE = 1.25  # of a total that is said aloud: a busy machine is slower
DEFAULT_BUDGET_SECONDS = 30
# What a group takes on two idle cores, and an eighth. The sum fits TOTAL_SECONDS on two workers.
BUDGET_SECONDS = {
    "capture": 58,
    "codegen": 285,
    "compiled": 160,
    "foreign": 95,
    "formats": 35,
    "fuzz": 220,
    "interpreted": 90,
    "ir": 8,
    "museum": 5,
    "passes": 90,
    "planted": 65,
    "runtime": 120,
    "study": 62,
    "unit": 45,
}
# These need what most machines lack; they run in `make gpu` or `make nightly`.
LEFT_OUT = ("gpu", "nightly", "goldens")


class Result(NamedTuple):
    """What one group did. `passed` and `failed` were run; errors count as failed.

    `lacking` need instructions that this processor lacks: they count as run, so that the pinned
    counts hold on every machine. `seconds` is the sum over the group's tests, set-up included:
    with n workers a group takes about the n-th part of it.
    """

    passed: int
    failed: int
    skipped: int
    lacking: int
    seconds: float

    @property
    def counted(self) -> tuple[int, int]:
        return self.passed + self.failed + self.lacking, self.skipped


KINDS = Result._fields[:4]


def groups() -> dict[str, list[Path]]:
    """Return the paths of each group, in the order in which they run."""
    found = {"unit": sorted(TESTS.glob("test_*.py"))}
    for folder in sorted(path for path in TESTS.iterdir() if path.is_dir()):
        if folder.name not in LEFT_OUT and any(folder.rglob("test_*.py")):
            found[folder.name] = [folder]
    return found


def budget_of(group: str) -> int:
    """Return the seconds that the tests of a group may take, summed."""
    return BUDGET_SECONDS.get(group, DEFAULT_BUDGET_SECONDS)


def run(chosen: dict[str, list[Path]], workers: int) -> tuple[dict[str, Result], bool]:
    """Run pytest once on all paths; return a result a group, and whether pytest itself held.

    One process a worker serves all groups: torch is imported once, and no group waits for the last
    test of the one before. A worker starts with a share of its own and steals from the others when
    it is done, so that a module's fixtures are built in one worker where they can be.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        command += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
        paths = [str(path) for paths in chosen.values() for path in paths]
        status = subprocess.run([*command, *paths], cwd=TESTS.parent, check=False).returncode
        cases = ElementTree.parse(report).getroot().iter("testcase") if report.exists() else ()
        results = count(cases, list(chosen))
    failed = any(result.failed for result in results.values())
    return results, status in (0, 5) or (status == 1 and failed)


def count(cases: Iterable[ElementTree.Element], names: Sequence[str]) -> dict[str, Result]:
    """Count the test cases of a JUnit report by group; an error counts as a failure."""
    rows: dict[str, list[tuple[str, float]]] = {name: [] for name in names}
    for case in cases:
        parts = case.get("classname", "").split(".")
        name = parts[1] if len(parts) > 2 and parts[1] in rows else "unit"
        rows[name].append((_outcome(case), float(case.get("time", "0"))))
    return {
        name: Result(
            *(sum(kind == part for kind, _ in found) for part in KINDS),
            seconds=sum(seconds for _, seconds in found),
        )
        for name, found in rows.items()
    }


def _outcome(case: ElementTree.Element) -> str:
    """Return which of KINDS a test case is."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    reason = skipped.get("message", "")
    return "lacking" if reason.startswith("the processor lacks") else "skipped"


def read_counts() -> dict[str, tuple[int, int]]:
    """Return {group: (run, skipped)} as pinned."""
    lines = COUNTS.read_text().splitlines() if COUNTS.exists() else []
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    return {name: (int(count), int(skipped)) for name, count, skipped in rows}


def write_counts(counts: dict[str, tuple[int, int]]) -> None:
    rows = [f"{name} {count} {skipped}" for name, (count, skipped) in sorted(counts.items())]
    head = "# group run skipped; written by tests/run_groups.py --update-counts"
    COUNTS.write_text("\n".join([head, *rows]) + "\n")


@contextmanager
def type_check(
    command: Sequence[str] = ("-m", "mypy", "--strict"),
) -> Iterator[Callable[[], bool]]:
    """Run mypy --strict beside what is done inside: it has one core's work, and tests leave gaps.

    Gives a function that waits for its end, prints what it wrote, and returns whether it found no
    mistake: so that its lines do not stand between the tests'.
    """

    def finish() -> bool:
        status = process.wait()
        output.seek(0)
        print(f"\nmypy --strict: {output.read().strip()}")
        if status:
            print(f"TYPES ARE WRONG, or were not checked: mypy --strict ended with {status}")
        return not status

    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        given = [sys.executable, *command]
        process = subprocess.Popen(given, cwd=TESTS.parent, stdout=output, stderr=output)
        try:
            yield finish
        finally:
            process.kill()
            process.wait()


def main() -> int:
    """Run the groups that were asked for; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the tests group by group.")
    parser.add_argument("groups", nargs="*", help="names of groups; none runs all")
    parser.add_argument("--workers", type=int, default=1, help="processes in each group")
    parser.add_argument("--types", action="store_true", help="check the types beside the tests")
    parser.add_argument("--update-counts", action="store_true", help="pin what was counted")
    chosen = parser.parse_args()
    known, pinned = groups(), read_counts()
    unknown = set(chosen.groups) - set(known)
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; the groups are {', '.join(known)}")
    wanted = {name: known[name] for name in chosen.groups or known}
    begin, typed = time.monotonic(), True
    with type_check() if chosen.types else nullcontext() as check_types:
        results, held = run(wanted, chosen.workers)
        if check_types is not None:
            typed = check_types()
    seconds = time.monotonic() - begin
    if chosen.update_counts:
        kept = {name: count for name, count in pinned.items() if name in known}
        pinned = {**kept, **{name: result.counted for name, result in results.items()}}
        write_counts(pinned)
    good = summarise(results, pinned)
    print(total_line(seconds, chosen.workers))
    if not held:
        print("pytest was interrupted or broke: see above")
    return 0 if good and held and typed else 1


def total_line(seconds: float, workers: int) -> str:
    """Return the last line: how long it took, and loudly where that is far above the budget."""
    text = f"{seconds:.0f} s with {workers} workers (budget {TOTAL_SECONDS} s on 2 cores)"
    share = seconds * workers / (2 * TOTAL_SECONDS)
    return text if share <= TOLERANCE else f"{text}: OVER BUDGET, {share:.0%} of it"


def summarise(results: dict[str, Result], pinned: dict[str, tuple[int, int]]) -> bool:
    """Print a line a group and the sums; return whether all passed and the counts hold."""
    print("\ngroup            passed failed skipped   seconds / budget")
    moved = []
    for name, result in results.items():
        budget = budget_of(name)
        late = "  over budget" if result.seconds > budget else ""
        row = f"{result.passed:6} {result.failed:6} {result.skipped + result.lacking:7}"
        print(f"{name:<16} {row} {result.seconds:9.1f} / {budget}{late}")
        if pinned.get(name) != result.counted:
            moved.append(f"{name}: ran and skipped {result.counted}, pinned {pinned.get(name)}")
    for line in moved:
        print(f"count moved: {line} (--update-counts if that is meant)")
    passed, failed, skipped, lacking = (
        sum(getattr(result, part) for result in results.values()) for part in KINDS
    )
    print(f"{passed} passed, {failed} failed, {skipped + lacking} skipped")
    return not failed and not moved


if __name__ == "__main__":
    sys.exit(main())
