"""Mutation testing: small mistakes in passes, emitters, scheduler and planner must fail a test.

    python -m tests.mutation map [TESTS...]     note once which test runs which statement
    python -m tests.mutation run [--areas passes,cpp] [--limit 40] [--seed 1]
    python -m tests.mutation report [--json]
    python -m tests.mutation check              do the tests that killed pass without a mutant?

docs/mutation.md tells what is mutated and how. Results are kept in --folder; `run` goes on where it
was stopped. Exit code 1: less than 85 % killed of the mutants that change anything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from tests.mutation import areas, coverage, report, selection, server
from tests.mutation.operators import Mutant

TESTED_BY = (
    "capture",
    "codegen",
    "compiled",
    "fuzz",
    "interpreted",
    "ir",
    "museum",
    "passes",
    "planted",
    "runtime",
)


def main() -> int:
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(description="Mutation testing; see docs/mutation.md.")
    parser.add_argument("command", choices=("map", "run", "report", "check"))
    parser.add_argument("tests", nargs="*", help="map: folders or files of tests")
    parser.add_argument("--folder", type=Path, default=areas.ROOT / "out" / "mutation")
    parser.add_argument(
        "--areas", default=",".join(areas.AREAS), help="of " + ", ".join(areas.AREAS)
    )
    parser.add_argument("--paths", default="", help="only these files, or mutants by key")
    parser.add_argument("--limit", type=int, default=40, help="mutants an area; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th mutant, from the i-th")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--again", action="store_true", help="try survivors again")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_intermixed_args()
    if chosen.command == "map":
        return _map(chosen.tests, chosen.folder)
    if chosen.command == "run":
        _run(chosen)
    found = report.load(chosen.folder)
    if chosen.command == "check":
        killers = sorted({v["test"] for v in found.values() if v["test"]})
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        return subprocess.run(
            [*command, "--hypothesis-seed=0", *killers], cwd=areas.ROOT
        ).returncode
    why = report.reasons()
    rows = report.rows(found, why)
    if chosen.json:
        print(json.dumps({"areas": [r._asdict() for r in rows], "mutants": list(found.values())}))
    else:
        print(report.table(found, why))
    return 0 if rows and rows[-1].share >= report.GOAL else 1


def _map(tests: list[str], folder: Path) -> int:
    if tests:
        return coverage.record(tests, folder / "map")
    groups = [f"tests/{name}" for name in TESTED_BY if (areas.ROOT / "tests" / name).exists()]
    command = [sys.executable, "-m", "tests.mutation", "map", "--folder", str(folder)]
    return max(subprocess.run([*command, g], cwd=areas.ROOT).returncode for g in groups)


def _run(chosen: argparse.Namespace) -> None:
    """Try the mutants of the sample that have no verdict yet."""
    begin = time.monotonic()
    mapped = coverage.Map.load(chosen.folder / "map")
    if not mapped.seconds:
        sys.exit("no map of the tests: python -m tests.mutation map")
    server.preload()
    selector = selection.Selector(mapped, _collected(mapped, chosen.folder))
    done = report.load(chosen.folder)
    for verdict in done.values():
        if verdict["test"]:
            selector.learn(verdict["mutant"]["file"], verdict["test"])
    index, count = map(int, chosen.shard.split("/"))
    only = [p for p in chosen.paths.split(",") if p]
    todo: list[tuple[str, Mutant]] = []
    for area in chosen.areas.split(","):
        todo += [(area, m) for m in selection.sample(area, chosen.seed, chosen.limit, only)]
    results = chosen.folder / f"results-{index}-of-{count}.jsonl"
    for area, mutant in todo[index::count]:
        known = done.get(mutant.key)
        if known and not (chosen.again and known["outcome"] == "survived"):
            continue
        if time.monotonic() - begin > chosen.seconds:
            break
        if not selector.covering(mutant):
            print(f"unmapped {mutant.file}: no test of the map runs it; map its tests", flush=True)
            continue
        verdict = _try(selector, mutant)
        report.save(results, area, verdict)
        print(f"{verdict.outcome:8} {verdict.seconds:6.1f} s {mutant.key} {mutant.file}:"
              f"{mutant.line} {mutant.operator}: {mutant.after[:90]}", flush=True)  # fmt: skip


def _try(selector: selection.Selector, mutant: Mutant) -> server.Verdict:
    """Run the tests that are likely to notice a mutant; if none does, all that run it."""
    first = selector.choose(mutant, selection.FIRST)
    verdict = server.run(mutant, first)
    if verdict.outcome == "survived":
        more = selector.choose(mutant, selection.WHOLE)
        last = server.run(mutant, {t: s for t, s in more.items() if t not in first})
        verdict = replace(
            last,
            num_tests=verdict.num_tests + last.num_tests,
            seconds=round(verdict.seconds + last.seconds, 2),
        )
    if verdict.test:
        selector.learn(mutant.file, verdict.test)
    return verdict


def _collected(mapped: coverage.Map, folder: Path) -> set[str]:
    """Return the tests of the map that exist now; kept in the folder while no test changes."""
    files = sorted({t.split("::")[0] for t in mapped.seconds})
    there = [f for f in files if (areas.ROOT / f).exists()]
    texts = sorted((areas.ROOT / "tests").rglob("*.py"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in texts) + repr(there).encode())
    kept = folder / f"collected-{digest.hexdigest()[:16]}.txt"
    if not kept.exists():
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
                   "-o", "addopts="]  # fmt: skip
        listed = subprocess.run([*command, *there], cwd=areas.ROOT, capture_output=True, text=True)
        assert listed.returncode == 0, listed.stdout[-2000:]
        kept.write_text(listed.stdout)
    return set(kept.read_text().splitlines()) & set(mapped.seconds)


if __name__ == "__main__":
    sys.exit(main())
