"""out[t, k] = f(table[ids[t], k]): rows of a table, with a pointwise tail such as a scale.

Layout: ids i64[T] (clamped to the table); the table is row-major or packed as rows16
([ceil(N / 16)][K][16], shared with the head's linear), in f32, bf16 or f16, widened exactly. Bytes
moved a token: one table row and one output row; rows16 touches 16 times as many cache lines, which
costs microseconds a token and saves a second copy of the table. Items: one token each. The loops
are those of pointwise.py: the gathered row is an address that does not change along the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from aios_compile.codegen.access import noun
from aios_compile.codegen.cpp import pointwise
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.pointwise_ops import op_name
from aios_compile.codegen.source import KernelSource


@dataclass(frozen=True)
class EmbeddingSpec:
    """A pointwise spec whose leaves hold the gathered address."""

    rows: pointwise.PointwiseSpec


def spec_of(
    body: fx.GraphModule, operands: Sequence[Operand], name: str | None = None
) -> EmbeddingSpec | None:
    """Return the spec of a body that looks up a table, or None for another body."""
    if not any(op_name(node) == "aten::embedding" for node in body.graph.nodes):
        return None
    rows = pointwise.spec_of(body, operands, name or noun(body, "embedding"))
    return None if rows is None else EmbeddingSpec(rows)


def reference(spec: EmbeddingSpec, *tensors: Tensor) -> list[Tensor]:
    """Compute the outputs in torch; a packed table is given in its packed form."""
    return pointwise.reference(spec.rows, *tensors)


def emit(spec: EmbeddingSpec) -> KernelSource:
    """Return the kernel."""
    return pointwise.emit(spec.rows)
