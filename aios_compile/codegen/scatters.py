"""Writes into a copy as index arithmetic: the value of an element is the last one written to it.

A scatter with few indices is written out as a chain of choices, one an index, so that it needs no
kernel of its own, no atomics and no order of threads: scatter_add adds in the order of the indices.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from aios_compile.codegen.access import Coordinates, Reader, shape_of
from aios_compile.codegen.expression import Const, Expr, call, cast
from aios_compile.codegen.linear_index import Linear
from aios_compile.codegen.movement import clamped, piece, rule
from aios_compile.codegen.operand import dim_of
from aios_compile.codegen.pointwise_ops import dtype_of, op_name

MAX_INDICES = 64  # of one element; each is a compare


@rule("scatter", "scatter_add")
def _scatter(reader: Reader, node: fx.Node, at: Coordinates) -> Expr | None:
    args: Any = node.args
    source, dim, index, written = args
    if not at:
        return None  # into a number: refused by name
    dim %= len(at)
    sizes, counts = shape_of(source), shape_of(index)
    count = counts[dim]
    others = [d for d in range(len(at)) if d != dim]
    if not isinstance(count, int) or count > MAX_INDICES or node.kwargs:
        return None
    if any(sizes[d] != counts[d] for d in others):
        return None
    dtype, result = dtype_of(node.meta["val"]), reader.at(source, at)
    for j in range(count):
        place = (*at[:dim], Linear.of(j), *at[dim + 1 :])
        here = call("eq", (cast(reader.at(index, place), "i64"), at[dim].expr()), "bool")
        value: Expr = Const(written, dtype)
        if isinstance(written, fx.Node):
            value = cast(_written(reader, written, place), dtype)
        if op_name(node).endswith("scatter_add"):
            value = call("add", (result, value), dtype)
        result = call("select", (here, value, result), dtype)
    return result


def _written(reader: Reader, written: fx.Node, place: Coordinates) -> Expr:
    return reader.at(written, place if shape_of(written) else ())


@rule("slice_scatter")
def _slice_scatter(reader: Reader, node: fx.Node, at: Coordinates) -> Expr | None:
    given: Any = dict(zip(("self", "src", "dim", "start", "end", "step"), node.args)) | node.kwargs
    dim, start = given.get("dim", 0) % len(at), given.get("start") or 0
    if given.get("step", 1) != 1 or not isinstance(start, int) or start < 0:
        return None
    whole, part = shape_of(node)[dim], dim_of(given["src"].meta["val"].shape[dim])
    edges = [Linear(), Linear.of(start), Linear.of(start).plus(part), Linear.of(whole)]
    moved = at[dim].plus(-start)
    chosen = piece(reader, at[dim], edges)
    if chosen in (0, 2):
        return reader.at(given["self"], at)
    if chosen == 1:
        return reader.at(given["src"], (*at[:dim], moved, *at[dim + 1 :]))
    low = call("ge", (moved.expr(), Const(0, "i64")), "bool")
    high = call("lt", (moved.expr(), Linear.of(part).expr()), "bool")
    inside = (*at[:dim], clamped(moved, part), *at[dim + 1 :])
    dtype = dtype_of(node.meta["val"])
    here = call("and", (low, high), "bool")
    return call(
        "select", (here, reader.at(given["src"], inside), reader.at(given["self"], at)), dtype
    )
