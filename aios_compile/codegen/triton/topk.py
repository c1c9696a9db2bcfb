"""The K largest or smallest of each row, in order, and where they stood; K = N is a stable sort.

The spec and the order are the C++ target's (its file has the layouts; ties by index, NaN largest).
An element counts those that stand before it: that is its place. No two agree and none is missing,
so the programs of a row need nothing from each other and the result has no order of work in it.
N * N comparisons a row, which a router's 8 to 256 experts and a vocabulary's few rows allow.
Bytes: the row, again from the caches for each BLOCK elements. Grid: (rows, blocks of a row).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from aios_compile.codegen.cpp import topk
from aios_compile.codegen.cpp.topk import INDICES, VALUES, TopkSpec
from aios_compile.codegen.linear_index import product
from aios_compile.codegen.naming import variable
from aios_compile.codegen.operand import Dim, Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.dialect import coordinates
from aios_compile.codegen.triton.frame import POINTERS, python_dim
from aios_compile.codegen.triton.template import (
    Bound,
    Entry,
    Text,
    kernel,
    next_power_of_two,
)

BLOCK, OTHERS = 64, 128


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> Bound[TopkSpec] | None:
    """Return the spec of a body whose outputs are results of one topk or sort, else None."""
    spec = topk.spec_of(body, operands)
    if spec is None or spec.source.operand.dtype not in POINTERS:
        return None
    return Bound(spec, tuple(operands))


def reference(spec: Bound[TopkSpec], x: Tensor) -> list[Tensor]:
    """Compute the outputs in torch."""
    return topk.reference(spec.spec, x)


def emit(bound: Bound[TopkSpec]) -> KernelSource:
    """Return the module."""
    spec = bound.spec
    source, dim = spec.source, spec.dim
    places = {which: (index, out) for which, index, out in spec.outputs}
    values, indices = (places.get(which, spec.outputs[0][1:]) for which in (VALUES, INDICES))
    size, dtype = source.operand.shape[dim], source.operand.dtype
    constants = {
        "K": spec.k, "LARGEST": spec.largest, "WIDENS": dtype in ("bf16", "f16"),
        "TRUTH": dtype == "bool", "HAS_VALUES": VALUES in places, "HAS_INDICES": INDICES in places,
    }  # fmt: skip
    outer = (*source.operand.shape[:dim], *source.operand.shape[dim + 1 :])
    block = min(BLOCK, next_power_of_two(size)) if isinstance(size, int) else BLOCK
    rows = (
        row_text("source", source.operand, dim, outer, source.offset),
        row_text("values", values[1], dim, outer),
        row_text("indices", indices[1], dim, outer),
    )
    arguments = [
        f"{name}_row({variable(operand, index)}, tl.program_id(0).to(tl.int64), T, S, R, P)"
        for name, index, operand in (
            ("source", source.index, bound.operands[source.index]),
            ("values", values[0], bound.operands[values[0]]),
            ("indices", indices[0], bound.operands[indices[0]]),
        )
    ]
    steps = [python_dim(o.strides[dim]) for o in (source.operand, values[1], indices[1])]
    count = python_dim(size)
    entry = Entry(
        "select_rows", (*arguments, *steps, count),
        f"{python_dim(product(outer))}, ({count} + {block - 1}) // {block}",
        (("BLOCK", block), ("OTHERS", OTHERS)),
    )  # fmt: skip
    return kernel(
        "topk", bound, ["topk: an element's rank is the number of those before it"],
        bound.operands, constants, [Text("\n\n\n".join(rows)), "topk"], [(None, [entry])], 1,
        lines=spec.lines,
    )  # fmt: skip


def row_text(name: str, operand: Operand, dim: int, outer: Sequence[Dim], offset: Dim = 0) -> str:
    """Return the function `<name>_row(pointer, row, T, S, R, P)`: where a row begins."""
    strides = (*operand.strides[:dim], *operand.strides[dim + 1 :])
    lines = ["@triton.jit", f"def {name}_row(pointer, row, T, S, R, P):"]
    lines += [f"    {line}" for line in coordinates((*outer, 1), "row")]
    terms = [f"i{d} * {python_dim(stride)}" for d, stride in enumerate(strides)]
    return "\n".join([*lines, f"    return {' + '.join(['pointer', *terms, python_dim(offset)])}"])
