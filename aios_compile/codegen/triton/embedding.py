"""out[t, k] = f(table[ids[t], k]): rows of a table, with a pointwise tail such as a scale.

Layout: ids i64[T] (clamped to the table); the table is row-major, so that a row is read in 16-byte
loads. Bytes moved a token: one table row and one output row. Grid: one program for BLOCK elements
of a row. The loops are those of pointwise.py: the gathered row is an address that does not change
along the row.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from aios_compile.codegen.cpp import embedding
from aios_compile.codegen.cpp.embedding import EmbeddingSpec
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import pointwise


def spec_of(
    body: fx.GraphModule, operands: Sequence[Operand], name: str | None = None
) -> EmbeddingSpec | None:
    """Return the spec of a body that looks up a table, or None; a packed table is the CPU's."""
    if any(o.packed for o in operands):
        return None
    return embedding.spec_of(body, operands, name)


def reference(spec: EmbeddingSpec, *tensors: Tensor) -> list[Tensor]:
    """Compute the outputs in torch."""
    return embedding.reference(spec, *tensors)


def emit(spec: EmbeddingSpec) -> KernelSource:
    """Return the kernel module."""
    return pointwise.emit(spec.rows)
