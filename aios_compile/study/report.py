"""The pass table: what each pass did, its cost and its certificate. No torch: read from JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aios_compile.passes.result import PassResult

WIDTH = 100
_COLUMNS = ("pass", "hits", "ms", "nodes", "error", "budget", "")


@dataclass(frozen=True)
class Report:
    """One row a pass, in order, and the notes of the compile. `str()` is a table of 100 columns."""

    passes: tuple[PassResult, ...]
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(results: Iterable[PassResult], notes: Iterable[str] = ()) -> Report:
        return Report(tuple(results), tuple(notes))

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Report:
        """Read what to_json wrote."""
        rows = tuple(PassResult.from_json(row) for row in data["passes"])
        return Report(rows, tuple(data.get("notes", ())))

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"passes": [p.to_json() for p in self.passes], "notes": list(self.notes)}

    def hits(self) -> dict[str, int]:
        """Return pass -> number of rewrites that were kept."""
        return {p.name: p.hits if p.kept else 0 for p in self.passes}

    def __getitem__(self, name: str) -> PassResult:
        """Return the row of a pass."""
        found = next((p for p in self.passes if p.name == name), None)
        if found is None:
            raise KeyError(f"no pass {name!r}; there are {', '.join(p.name for p in self.passes)}")
        return found

    def __str__(self) -> str:
        rows = [_COLUMNS, *(_row(p) for p in self.passes), _totals(self.passes)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS) - 1)]
        left = WIDTH - sum(widths) - 2 * len(widths)
        lines = []
        for i, row in enumerate(rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
            lines.append("  ".join([*cells, _shorten(row[-1], left)]).rstrip())
            if i == 0 or i == len(rows) - 2:
                lines.append("-" * WIDTH)
        lines += list(_remarks(self.passes))
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _row(p: PassResult) -> tuple[str, ...]:
    measured = p.max_error is not None and p.error_budget is not None
    before, after = p.nodes
    return (
        p.name + ("" if p.required else " *"),
        str(p.hits) if p.hits else "-",
        f"{p.milliseconds:.0f}",
        str(after) if before == after else f"{before} > {after}",
        f"{p.max_error:.1e}" if measured else "",
        f"{p.error_budget:.1e}" if measured else "",
        _state(p),
    )


def _state(p: PassResult) -> str:
    if not p.kept:
        return p.reason if p.reason == "disabled" else f"NOT KEPT: {p.reason}"
    if not p.hits and not p.refusals:
        return ""
    return f"{len(p.refusals)} refused" if p.refusals else ""


def _totals(passes: tuple[PassResult, ...]) -> tuple[str, ...]:
    rewriting = sum(p.milliseconds for p in passes)
    proving = sum(p.verify_milliseconds for p in passes)
    nodes = f"{passes[0].nodes[0]} > {passes[-1].nodes[1]}" if passes else ""
    hits = str(sum(p.hits for p in passes if p.kept))
    cached = sum(p.cached for p in passes)
    remark = f"proofs {proving:.0f} ms" + (f", {cached} from the cache" if cached else "")
    return ("total (* optional)", hits, f"{rewriting:.0f}", nodes, "", "", remark)


def _remarks(passes: tuple[PassResult, ...]) -> Iterable[str]:
    """Yield every refusal with its reason, and the full reason of what was not kept."""
    for p in passes:
        if not p.kept and p.reason != "disabled":
            yield f"{p.name}: not kept, {p.reason}"
        for refusal in p.refusals:
            yield f"{p.name}: refused, {refusal}"


def _shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."
