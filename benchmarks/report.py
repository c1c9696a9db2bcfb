"""Results of benchmarks.cpu: kept in a file as rows are done, printed as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


class Results:
    """A JSON file: {shape, threads, rows: {weights: {row: numbers and where they come from}}}."""

    def __init__(self, path: Path | None, shape: str, threads: int) -> None:
        name = f"{date.today().isoformat()}-cpu-{shape}-{threads}-threads.json"
        self.path = path or FOLDER / name
        self.data: dict[str, Any] = {"shape": shape, "threads": threads, "rows": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
            same = (self.data["shape"], self.data["threads"]) == (shape, threads)
            assert same, f"{self.path} holds another shape or number of threads"

    def has(self, weights: str, row: str) -> bool:
        return row in self.data["rows"].get(weights, {})

    def add(self, weights: str, row: str, found: dict[str, Any], where: dict[str, Any]) -> None:
        """Keep one row and write the file."""
        self.data["machine"] = {k: v for k, v in where.items() if k not in ("date", "commit")}
        told = {"date": where["date"], "commit": where["commit"], **found}
        self.data["rows"].setdefault(weights, {})[row] = told
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(rounded(self.data), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Return the value with floats of five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def table(data: dict[str, Any]) -> str:
    """Return a Markdown table of all rows."""
    lines = [
        f"{data['shape']}, {data['threads']} threads",
        "",
        "| row | weights | ours | of the floor | against (spread) |",
        "|---|---|---|---|---|",
    ]
    for weights, rows in data["rows"].items():
        for row, found in rows.items():
            lines.append("| " + " | ".join((row, weights, *cells(row, found))) + " |")
    return "\n".join(lines)


def cells(row: str, found: dict[str, Any]) -> Iterable[str]:
    """Return ours, its share of the floor and the ratios, as text."""
    if row == "memory":
        share = found["above_baseline_bytes"] / (found["limit_bytes"] / 1.1)
        peers = (f"{n} {p['above_baseline_bytes'] / 1e6:.0f} MB" for n, p in _peers(found))
        return (
            f"{found['above_baseline_bytes'] / 1e6:.0f} MB",
            f"{share:.2f} of weights + KV",
            ", ".join(peers),
        )
    median = found["seconds"]["median"]
    if row == "starts":
        peers = (f"{n} {p['seconds']['median']:.2f} s" for n, p in _peers(found))
        return (
            f"{median:.2f} s cached, {found['nothing_cached_seconds']:.1f} s with nothing cached",
            "",
            ", ".join(peers),
        )
    share = found["share"]
    ours = f"{median * 1e3:.3g} ms, {found['tokens'] / median:.4g} tokens/s"
    if row.startswith("context"):
        ours = f"{median * 1e9:.3g} ns a token of context"
    ratios = (
        f"{name} {p['ratio']['median']:.2f}x ({p['ratio']['least']:.2f}-{p['ratio']['most']:.2f})"
        + (" VOID" if p.get("health", {}).get("void") else "")
        for name, p in _peers(found)
    )
    return (
        ours,
        f"{share['median']:.0%} ({share['least']:.0%}-{share['most']:.0%})",
        ", ".join(ratios),
    )


def _peers(found: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return found.get("peers", {}).items()


def show(row: str, weights: str, found: dict[str, Any]) -> None:
    """Print a row as it is done."""
    text = "; ".join(c for c in cells(row, found) if c)
    if "cores_busy_with_other_work" in found:
        text += f"; other work on {found['cores_busy_with_other_work']['median']:.1f} cores"
    print(f"{weights} {row}: {text}", flush=True)
