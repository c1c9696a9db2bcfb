"""Add up the parts of a campaign: `python -m aios_compile.study.fuzz.report FOLDER` prints it.

A part is a JSON file of tests/fuzz, tests/interpreted/test_fuzz.py or `aios fuzz --json`, run at
any time on any machine: parts of one target are added.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aios_compile.study.fuzz.campaign import passes_of

LEAST, OF = 50, {"cpp": 5000, "triton": 1000}  # examples that a pass fires on, of a campaign's


def rare(target: str, fired: Mapping[str, int], examples: int) -> dict[str, int]:
    """Return the passes that fired on too few examples. Triton: of those that C++ lacks."""
    others = passes_of("cpp") if target != "cpp" else ()
    wanted = LEAST * examples // OF[target]
    own = [name for name in passes_of(target) if name not in others]
    return {name: fired.get(name, 0) for name in own if fired.get(name, 0) < wanted}


def read_parts(folder: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Return the parts in a folder by target, C++ first. Other JSON files are passed over."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        part = json.loads(text or "null")  # `aios fuzz --json > file` is empty until it ends
        if isinstance(part, dict) and {"fired", "examples", "failures"} <= set(part):
            found.setdefault(part["target"], []).append(part)
    return dict(sorted(found.items()))


def _sum(parts: Sequence[Mapping[str, Any]], key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part[key])
    return total


def lines(target: str, parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a report in Markdown: examples, numbers, a table of passes, what failed."""
    examples = sum(p["examples"] for p in parts)
    seconds = sum(p["seconds"] for p in parts)
    yield f"### {target}: {examples:,} examples in {len(parts)} parts"
    yield ""
    yield f"Numbers by seed: {_numbers(parts)}. {seconds:,.0f} s of wall time, one after another."
    second = sum(p["second_opinions"] for p in parts)
    worst = max(p["worst_share_of_budget"] for p in parts)
    yield f"{second} second opinions; the largest error is {worst:.2g} of the plain budget."
    yield ""
    yield "| pass | examples | pass | examples |"
    yield "|---|---|---|---|"
    counts = _sum(parts, "fired")
    fired = sorted(counts.items(), key=lambda item: (item[1], item[0]))
    half = (len(fired) + 1) // 2
    for i, left in enumerate(fired[:half]):
        right = fired[half + i] if half + i < len(fired) else ("", "")
        yield f"| {left[0]} | {left[1]} | {right[0]} | {right[1]} |"
    yield ""
    contexts = _sum(parts, "contexts")
    kinds = [k for k in contexts if k.split()[0] in ("source", "use", "repeat")]
    if kinds:
        least = min(kinds, key=lambda k: contexts[k])
        yield f"{len(kinds)} kinds of context; the rarest is {least!r}: {contexts[least]} examples."
    few = [f"{name} {n}" for name, n in rare(target, counts, examples).items()]
    yield f"Below {LEAST} in {OF[target]:,}: {', '.join(few) or 'none'}."
    refused = _sum(parts, "refused")
    yield f"Refused: {sum(refused.values())}. Failures: {sum(len(p['failures']) for p in parts)}."
    yield from (f"- refused {n}: {reason}" for reason, n in refused.most_common())
    for part in parts:
        for failure in part["failures"]:
            message = failure["message"].splitlines()[0]
            yield f"- failed: number {failure['number']} of seed {failure['seed']}: {message}"


def _numbers(parts: Sequence[Mapping[str, Any]]) -> str:
    """Say which examples were drawn: "seed 0: 0-199, 400-599"."""
    said = []
    for seed in sorted({p["seed"] for p in parts}):
        spans: list[list[int]] = []
        for first, last in sorted({tuple(p["numbers"]) for p in parts if p["seed"] == seed}):
            if spans and first <= spans[-1][1] + 1:
                spans[-1][1] = max(last, spans[-1][1])
            else:
                spans.append([first, last])
        said.append(f"seed {seed}: " + ", ".join(f"{a}-{b}" for a, b in spans))
    return "; ".join(said)


def main(folder: str) -> None:
    """Print the report of all parts in a folder."""
    for target, parts in read_parts(Path(folder)).items():
        print("\n".join(lines(target, parts)), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1])
