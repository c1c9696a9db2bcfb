"""Views, copies and gathers as index arithmetic: where an element of the result comes from.

Each rule gets the coordinates of the result and reads its argument at the coordinates it came from.
An index out of range is clamped: a kernel never reads outside its operand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from aios_compile.codegen.access import Coordinates, Reader, shape_of
from aios_compile.codegen.expression import Const, Expr, Index, call, cast
from aios_compile.codegen.linear_index import Linear, divided, product, remainder
from aios_compile.codegen.operand import Dim, dim_of
from aios_compile.codegen.pointwise_ops import dtype_of, op_name

Rule = Callable[[Reader, fx.Node, Coordinates], "Expr | None"]
RULES: dict[str, Rule] = {}


def read(reader: Reader, node: fx.Node, at: Coordinates) -> Expr | None:
    """Return the value of a view-like node at `at`, or None when no rule knows the node."""
    if node.target is operator.getitem:
        rule = PARTS.get(op_name(_args(node)[0]))
    else:
        rule = RULES.get(op_name(node))
    return None if rule is None else rule(reader, node, at)


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update({name if "::" in name else f"aten::{name}": function for name in names})
        return function

    return register


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _dim(value: Any) -> Dim:
    return dim_of(value.meta["val"] if isinstance(value, fx.Node) else value)


def _replaced(at: Coordinates, dim: int, value: Linear) -> Coordinates:
    return (*at[:dim], value, *at[dim + 1 :])


@rule("expand", "broadcast_to", "expand_as")
def _expand(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    return reader.broadcast(_args(node)[0], at)


@rule("permute")
def _permute(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    source: list[Linear] = [Linear()] * len(at)
    for coordinate, dim in zip(at, _args(node)[1]):
        source[dim % len(at)] = coordinate
    return reader.at(_args(node)[0], tuple(source))


@rule("transpose", "t", "swapaxes")
def _transpose(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    a, b = (_args(node)[1], _args(node)[2]) if len(node.args) > 2 else (0, -1)
    source = list(at)
    if len(at) > 1:
        source[a], source[b] = at[b], at[a]
    return reader.at(_args(node)[0], tuple(source))


@rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "view_as", "unflatten")
def _view(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    source = _args(node)[0]
    return reader.at(source, reshaped(shape_of(node), at, shape_of(source), reader.limits()))


def reshaped(
    shape: tuple[Dim, ...], at: Coordinates, source: tuple[Dim, ...], limits: Mapping[int, int]
) -> Coordinates:
    """Return coordinates in `source` of the element `at` in `shape`, group by equal group."""
    result: list[Linear] = []
    i = j = 0
    while j < len(source):
        first_i, first_j = i, j
        left: Dim = 1
        right: Dim = source[j]
        j += 1
        while left != right:
            if i < len(shape) and not _is_multiple(left, right):
                left = product((left, shape[i]))
                i += 1
            elif j < len(source):
                right = product((right, source[j]))
                j += 1
            else:
                left, i = right, len(shape)
        if j == len(source):
            i = len(shape)
        result += _group(shape[first_i:i], at[first_i:i], source[first_j:j], limits)
    return tuple(result)


def _is_multiple(left: Dim, right: Dim) -> bool:
    """Return whether `left` is the larger product, so that the other side must grow."""
    if isinstance(left, int) and isinstance(right, int):
        return left > right
    size = [max((len(f) for f, _ in d.terms), default=0) if not isinstance(d, int) else 0
            for d in (left, right)]  # fmt: skip
    if size[0] != size[1]:
        return size[0] > size[1]
    return _leading(left) > _leading(right)


def _leading(dim: Dim) -> int:
    return dim if isinstance(dim, int) else dim.terms[0][1]


def _group(
    shape: tuple[Dim, ...], at: Coordinates, source: tuple[Dim, ...], limits: Mapping[int, int]
) -> list[Linear]:
    kept = [(s, c) for s, c in zip(shape, at) if s != 1]
    wanted = [s for s in source if s != 1]
    if [s for s, _ in kept] == wanted:
        found = iter(c for _, c in kept)
        return [Linear() if s == 1 else next(found) for s in source]
    flat = Linear()
    for size, coordinate in kept:
        flat = flat.times(size).plus(coordinate)
    result: list[Linear] = []
    for place, size in enumerate(source):
        inner = product(source[place + 1 :])
        result.append(Linear() if size == 1 else divided(flat, inner, limits))
        flat = flat if size == 1 else remainder(flat, inner, limits)
    return result


@rule("select")
def _select(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    source, dim, index = _args(node)
    sizes = shape_of(source)
    dim = dim % len(sizes)
    place = Linear.of(_dim(index))
    if isinstance(index, int) and index < 0:
        place = place.plus(sizes[dim])
    return reader.at(source, (*at[:dim], place, *at[dim:]))


@rule("slice")
def _slice(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    source, dim = _args(node)[0], _arg(node, 1, "dim", 0) % len(at)
    start, step = _arg(node, 2, "start"), _arg(node, 4, "step", 1)
    begin = Linear.of(0 if start is None else _dim(start))
    if isinstance(start, int) and start < 0:
        begin = begin.plus(shape_of(source)[dim])
    return reader.at(source, _replaced(at, dim, at[dim].times(step).plus(begin)))


@rule("flip")
def _flip(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    source, sizes = _args(node)[0], shape_of(node)
    for dim in _args(node)[1] if at else ():  # a number has nothing to turn
        dim = dim % len(at)
        at = _replaced(at, dim, at[dim].times(-1).plus(sizes[dim]).plus(-1))
    return reader.at(source, at)


@rule("repeat")
def _repeat(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    sizes = shape_of(_args(node)[0])
    inner = at[len(at) - len(sizes) :]
    return reader.at(_args(node)[0], tuple(remainder(c, s) for c, s in zip(inner, sizes)))


@rule("arange")
def _arange(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    numbers = list(_args(node))
    start, step = (0 if len(numbers) < 2 else numbers[0]), (1 if len(numbers) < 3 else numbers[2])
    return cast(_sequence(at[0], start, step), dtype_of(node.meta["val"]))


@rule("prims::iota")
def _iota(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    start, step = node.kwargs.get("start", 0), node.kwargs.get("step", 1)
    return cast(_sequence(at[0], start, step), dtype_of(node.meta["val"]))


def _sequence(at: Linear, start: Any, step: Any) -> Expr:
    if isinstance(start, float) or isinstance(step, float):
        moved = call("mul", (cast(at.expr(), "f32"), Const(float(step))), "f32")
        return call("add", (moved, Const(float(start))), "f32")
    return at.times(_dim(step)).plus(_dim(start)).expr()


@rule("cat", "concatenate")
def _cat(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    parts: Any = [p for p in _args(node)[0] if shape_of(p) != (0,)]
    dim = _arg(node, 1, "dim", 0) % len(at)
    starts, start = [], Linear()
    for part in parts:
        starts.append(start)
        start = start.plus(shape_of(part)[dim])
    starts.append(start)
    chosen = piece(reader, at[dim], starts)
    if chosen is not None:
        moved = at[dim].plus(starts[chosen].times(-1))
        return reader.at(parts[chosen], _replaced(at, dim, moved))
    dtype, result = dtype_of(node.meta["val"]), None
    for part, begin, end in reversed(list(zip(parts, starts, starts[1:]))):
        moved = clamped(at[dim].plus(begin.times(-1)), shape_of(part)[dim])
        value = cast(reader.at(part, _replaced(at, dim, moved)), dtype)
        before = call("lt", (at[dim].expr(), end.expr()), "bool")
        result = value if result is None else call("select", (before, value, result), dtype)
    assert result is not None
    return result


def piece(reader: Reader, at: Linear, starts: list[Linear]) -> int | None:
    """Return the piece that holds the whole computed range, or ask for cuts and return None."""
    atoms = at.terms
    whole = all(isinstance(s.constant, int) and not s.terms for s in starts[1:-1])
    if len(starts) == 2:
        return 0
    if len(atoms) > 1 or not isinstance(at.constant, int) or not whole:
        return None
    borders = [s.constant for s in starts[1:-1] if isinstance(s.constant, int)]
    if not atoms:
        return sum(at.constant >= b for b in borders)
    atom, coefficient = atoms[0]
    if not isinstance(atom, Index) or coefficient != 1:
        return None
    low, high = reader.ranges[atom.dim]
    low, high = low + at.constant, None if high is None else high + at.constant
    inside = [b for b in borders if low < b and (high is None or b < high)]
    if inside:
        reader.cuts.update((atom.dim, b - at.constant) for b in inside)
        return None
    return sum(low >= b for b in borders)


def clamped(at: Linear, size: Dim) -> Linear:
    last = Linear.of(size).plus(-1).expr()
    top = call("min", (at.expr(), last), "i64")
    return Linear.of(call("max", (top, Const(0, "i64")), "i64"))


@rule("constant_pad_nd")
def _pad(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    source: Any = _args(node)[0]
    pads: Any = _args(node)[1]
    dtype = dtype_of(node.meta["val"])
    value = _arg(node, 2, "value", 0)
    fill = Const(value if node.meta["val"].is_floating_point() else int(value), dtype)
    sizes, moved, inside = shape_of(source), list(at), None
    for step in range(len(pads) // 2):
        dim, before = len(at) - 1 - step, _dim(pads[2 * step])
        shifted = at[dim].plus(Linear.of(before).times(-1))
        edges = [Linear(), Linear.of(before), Linear.of(before).plus(sizes[dim]),
                 Linear.of(shape_of(node)[dim])]  # fmt: skip
        chosen = piece(reader, at[dim], edges)
        if chosen in (0, 2):
            return fill
        if chosen == 1:
            moved[dim] = shifted
            continue
        low = call("ge", (shifted.expr(), Const(0, "i64")), "bool")
        high = call("lt", (shifted.expr(), Linear.of(sizes[dim]).expr()), "bool")
        here = call("and", (low, high), "bool")
        inside = here if inside is None else call("and", (inside, here), "bool")
        moved[dim] = clamped(shifted, sizes[dim])
    value = reader.at(source, tuple(moved))
    return value if inside is None else call("select", (inside, value, fill), dtype)


@rule("tril", "triu")
def _triangle(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    value = reader.at(_args(node)[0], at)
    distance = at[-1].plus(at[-2].times(-1)).expr()
    op = "le" if op_name(node) == "aten::tril" else "ge"
    keep = call(op, (distance, Const(_arg(node, 1, "diagonal", 0), "i64")), "bool")
    zero = Const(False if value.dtype == "bool" else 0, value.dtype)
    return call("select", (keep, value, zero), value.dtype)


# ---- gathers ------------------------------------------------------------------------------------


def gathered(reader: Reader, index: fx.Node, at: Coordinates, size: Dim) -> Linear:
    """Return a loaded index, negative ones counted from the end, clamped to [0, size)."""
    value = cast(reader.at(index, at), "i64")
    end = Linear.of(size).expr()
    negative = call("lt", (value, Const(0, "i64")), "bool")
    value = call("select", (negative, call("add", (value, end), "i64"), value), "i64")
    return clamped(Linear.of(value), size)


@rule("index_select")
def _index_select(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    source, dim, index = _args(node)
    if not shape_of(source):
        return reader.at(source, ())  # a number has one element to choose
    dim = dim % len(at)
    place = gathered(reader, index, (at[dim],), shape_of(source)[dim])
    return reader.at(source, _replaced(at, dim, place))


@rule("gather")
def _gather(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    source, dim, index = _args(node)[:3]
    if not shape_of(source):
        return reader.at(source, ())
    dim = dim % len(at)
    place = gathered(reader, index, at, shape_of(source)[dim])
    return reader.at(source, _replaced(at, dim, place))


@rule("embedding")
def _embedding(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    table, ids = _args(node)[:2]
    place = clamped(Linear.of(cast(reader.at(ids, at[:-1]), "i64")), shape_of(table)[0])
    return reader.at(table, (place, at[-1]))


@rule("index")
def _index(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    """Advanced indexing by adjacent index tensors (broadcast together)."""
    source: Any = _args(node)[0]
    indices: Any = list(_args(node)[1])
    used = [d for d, i in enumerate(indices) if i is not None]
    rank = max(len(shape_of(indices[d])) for d in used)
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    inner = at[first : first + rank]
    kept = iter((*at[:first], *at[first + rank :]))
    sizes, result = shape_of(source), []
    for dim in range(len(sizes)):
        if dim not in used:
            result.append(next(kept))
            continue
        shape = shape_of(indices[dim])
        aligned = inner[rank - len(shape) :]
        place = tuple(Linear() if s == 1 else c for s, c in zip(shape, aligned))
        result.append(gathered(reader, indices[dim], place, sizes[dim]))
    return reader.at(source, tuple(result))


# ---- operators that return several tensors, read through getitem --------------------------------


def _split(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    owner: Any = _args(node)[0]
    index: Any = _args(node)[1]
    dim = _arg(owner, 2, "dim", 0) % len(at)
    start = Linear()
    for value in owner.meta["val"][:index]:
        start = start.plus(dim_of(value.shape[dim]))
    return reader.at(owner.args[0], _replaced(at, dim, at[dim].plus(start)))


def _unbind(reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    owner: Any = _args(node)[0]
    dim = _arg(owner, 1, "dim", 0) % (len(at) + 1)
    place = Linear.of(_args(node)[1])
    return reader.at(owner.args[0], (*at[:dim], place, *at[dim:]))


PARTS: dict[str, Rule] = {
    "aten::split": _split,
    "aten::split_with_sizes": _split,
    "aten::chunk": _split,
    "aten::unbind": _unbind,
}
