"""Results of mutants on disk, and the table that is made of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tests.mutation.server import Verdict

REASONS = Path(__file__).parent / "survivors.txt"
GOAL = 0.85


class Row(NamedTuple):
    """An area: mutants tried, killed, of these by time; survivors that change nothing; others."""

    area: str
    tried: int
    killed: int
    timeouts: int
    equivalent: int
    survived: int

    @property
    def share(self) -> float:
        """Return the share killed of those that change anything."""
        return self.killed / max(1, self.tried - self.equivalent)


def save(file: Path, area: str, verdict: Verdict) -> None:
    """Append one verdict."""
    line = {"area": area, **asdict(verdict)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {mutant's key: its last verdict} of all runs in a folder."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("results*.jsonl")):
        for line in file.read_text().splitlines():
            verdict = json.loads(line)
            key = verdict["mutant"]["key"]
            # a later run has later tests: what was killed once stays killed
            if found.get(key, verdict)["outcome"] == "survived" or key not in found:
                found[key] = verdict
    return found


def reasons() -> dict[str, str]:
    """Return {key: why it survives} of survivors that were read; see survivors.txt."""
    lines = REASONS.read_text().splitlines() if REASONS.exists() else []
    pairs = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return {pair[0]: pair[1] for pair in pairs}


def rows(found: dict[str, dict[str, Any]], why: dict[str, str]) -> list[Row]:
    """Return a row an area, and one for all. why: the reasons of survivors, by key."""
    counts: dict[str, Counter[str]] = {}
    for key, verdict in found.items():
        equivalent = why.get(key, "").startswith("equivalent")
        outcome = verdict["outcome"]
        kind = "equivalent" if outcome == "survived" and equivalent else outcome
        for area in (verdict["area"], "all"):
            counts.setdefault(area, Counter())[kind] += 1
    order = sorted(counts, key=lambda a: (a == "all", a))
    return [
        Row(
            area, sum(c.values()), c["killed"] + c["timeout"], c["timeout"], c["equivalent"],
            c["survived"],
        )
        for area, c in ((a, counts[a]) for a in order)
    ]  # fmt: skip


def table(found: dict[str, dict[str, Any]], why: dict[str, str]) -> str:
    """Return the report: an area a line, then the survivors with their reasons."""
    lines = ["area       tried  killed  (by time)  equivalent  survived   share"]
    for r in rows(found, why):
        lines.append(
            f"{r.area:<10} {r.tried:5} {r.killed:7} {r.timeouts:10} {r.equivalent:11} "
            f"{r.survived:9} {r.share:7.1%}"
        )
    for key, verdict in sorted(found.items(), key=lambda kv: kv[1]["mutant"]["file"]):
        if verdict["outcome"] == "survived":
            m = verdict["mutant"]
            lines += [
                "",
                f"{key} {m['file']}:{m['line']} {m['function']} ({m['operator']}; "
                f"{verdict['num_tests']} tests)",
                f"    - {m['before']}",
                f"    + {m['after']}",
                f"    {why.get(key, 'not read yet')}",
            ]
    return "\n".join(lines)
