"""The outputs of a step in one block of bytes: what is copied back to the host. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aios_compile.codegen.operand import BYTES, dim_value
from aios_compile.codegen.program import TensorEntry

SAMPLED = "sampled_ids"  # what the next step may take as its tokens, on the device
LAZY = "logits"  # large and seldom read: copied by itself, when somebody asks for it


@dataclass(frozen=True)
class StepResults:
    """outputs: (name, dtype, values a row); each is [R, values] behind the one before.

    Those of 8 bytes come first, so that all are aligned for any R.
    """

    outputs: tuple[tuple[str, str, int], ...]

    @staticmethod
    def of(outputs: Sequence[TensorEntry], sizes: Mapping[str, int]) -> StepResults:
        """Return the block of a program's outputs; it is empty when there are but logits."""
        rows = [
            (e.name, e.dtype, math.prod(dim_value(d, sizes) for d in e.shape[1:]))
            for e in outputs
            if e.name != LAZY
        ]
        assert all(dtype in ("i64", "f32") for _, dtype, _ in rows), rows
        return StepResults(tuple(sorted(rows, key=lambda row: -BYTES[row[1]])))

    def row_bytes(self) -> int:
        """Return the bytes of one row of all outputs."""
        return sum(BYTES[dtype] * width for _, dtype, width in self.outputs)

    def places(self, rows: int) -> dict[str, int]:
        """Return the byte at which each output begins, for a bucket of so many rows."""
        begins, end = {}, 0
        for name, dtype, width in self.outputs:
            begins[name] = end
            end += BYTES[dtype] * width * rows
        return begins
