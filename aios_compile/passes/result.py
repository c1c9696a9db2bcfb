"""What one pass did to the program, as plain data (no torch: reports are rebuilt from JSON)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class PassResult:
    """The row of one pass in the report.

    hits: rewrites in all regions and the outer graph. nodes: graph nodes before and after.
    op_deltas: op name -> change in count. max_error, error_budget: largest error against the fp64
    oracle and what eager's own error allows, both relative to the largest value of that output;
    None when nothing was measured. kept: False for a disabled, crashed or reverted pass (`reason`).
    """

    name: str
    numerics: str
    required: bool
    hits: int = 0
    refusals: tuple[str, ...] = ()
    milliseconds: float = 0.0
    nodes: tuple[int, int] = (0, 0)
    op_deltas: Mapping[str, int] | None = None
    max_error: float | None = None
    error_budget: float | None = None
    kept: bool = True
    reason: str = ""
    seed: int = 0
    verify_milliseconds: float = 0.0
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        row = {**asdict(self), "op_deltas": dict(self.op_deltas or {})}
        for name in ("max_error", "error_budget"):  # JSON has no infinity; `reason` tells it
            value = row[name]
            row[name] = value if value is None or math.isfinite(value) else None
        return row

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> PassResult:
        """Read a row that to_json wrote; fields of other versions are left out."""
        known = {f.name for f in fields(PassResult)}
        values = {k: v for k, v in row.items() if k in known}
        values["refusals"] = tuple(values.get("refusals", ()))
        before, after = values.get("nodes", (0, 0))
        values["nodes"] = (before, after)
        return PassResult(**values)
