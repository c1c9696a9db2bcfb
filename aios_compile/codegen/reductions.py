"""Reductions and what is made of them, as expressions: sums, means, softmax, norms.

A `Space` is the loop nest of one reduction: the dimensions that are kept are rows, and the reduced
ones are the innermost coordinate. Every reduction of a body must fit the same space.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from aios_compile.codegen.access import Coordinates, NotExpressible, Reader, Reduction, shape_of
from aios_compile.codegen.expression import Const, Expr, Index, Size, call, cast, wide
from aios_compile.codegen.linear_index import Linear, product
from aios_compile.codegen.movement import reshaped
from aios_compile.codegen.operand import Dim
from aios_compile.codegen.pointwise_ops import dtype_of, op_name
from aios_compile.ir.provenance import source_line

Rule = Callable[["Space", Reader, fx.Node, Coordinates], Expr]
RULES: dict[str, Rule] = {}
PARTS: dict[str, Rule] = {}


@dataclass(frozen=True)
class Space:
    """The iteration space: `source` are the sizes of the reduced tensor, `dims` those reduced."""

    source: tuple[Dim, ...]
    dims: tuple[int, ...]

    @property
    def rows(self) -> tuple[Dim, ...]:
        return tuple(s for d, s in enumerate(self.source) if d not in self.dims)

    @property
    def size(self) -> Dim:
        return product([self.source[d] for d in self.dims])

    @property
    def shape(self) -> tuple[Dim, ...]:
        return (*self.rows, self.size)

    @property
    def inner(self) -> int:
        return len(self.rows)

    def ranges(self) -> tuple[tuple[int, int | None], ...]:
        return tuple((0, s if isinstance(s, int) else None) for s in self.shape)

    def row_coordinates(self) -> Coordinates:
        return tuple(Linear() if s == 1 else Linear.of(Index(d)) for d, s in enumerate(self.rows))

    def coordinates(self, rows: Coordinates, limits: dict[int, int]) -> Coordinates:
        """Return the coordinates in the reduced tensor of the innermost index, in given rows."""
        reduced = tuple(self.source[d] for d in self.dims)
        inner = reshaped((self.size,), (Linear.of(Index(self.inner)),), reduced, limits)
        kept, inside = iter(rows), iter(inner)
        return tuple(next(inside if d in self.dims else kept) for d in range(len(self.source)))


def dims_of(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """Return (the tensor that a node reduces, the dimensions), or None for another node."""
    name = op_name(node)
    if name not in RULES and name not in PARTS:
        return None
    source: Any = _args(node)[0]
    rank = len(shape_of(source))
    if name in LAST_DIM:
        return source, (rank - 1,)
    if name == "aten::native_layer_norm":
        return source, tuple(range(rank - len(_args(node)[1]), rank))
    dims: Any = _args(node)[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if name in ("aten::_softmax", "aten::_log_softmax") or isinstance(dims, int):
        dims = [dims]
    if name == "aten::linalg_vector_norm":
        dims = _args(node)[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if dims is None or isinstance(dims, bool) or len(dims) == 0:
        dims = range(rank)
    if rank == 0:  # torch lets a number be reduced along "its" dimension 0 or -1
        return source, ()
    return source, tuple(sorted({d % rank for d in dims}))


LAST_DIM = ("aios::rms_norm", "aios::layer_norm")


def space_of(body: fx.GraphModule) -> Space | None:
    """Return the space of a body's first reduction, or None when it reduces nothing."""
    for node in body.graph.nodes:
        if node.op == "call_function" and (found := dims_of(node)) is not None:
            return Space(shape_of(found[0]), found[1])
    return None


def reduce(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr | None:
    """Return the value of a reduction node at `at`, or None for another node."""
    if node.target is operator.getitem:
        rule = PARTS.get(op_name(_args(node)[0]))
    else:
        rule = RULES.get(op_name(node))
    return None if rule is None else rule(space, reader, node, at)


def reduced(
    space: Space,
    reader: Reader,
    node: fx.Node,
    at: Coordinates,
    kind: str,
    value: Callable[[Expr], Expr] = lambda x: x,
    dtype: str | None = None,
) -> Expr:
    """Return one reduction of value(x) over the inner coordinate in the row that `at` lies in.

    `at` are coordinates of the kept dimensions, with or without the reduced ones.
    """
    found = dims_of(node)
    assert found is not None
    source, dims = found
    sizes = shape_of(source)
    kept = [s for d, s in enumerate(sizes) if d not in dims]
    rows = at if len(at) == len(kept) else tuple(c for d, c in enumerate(at) if d not in dims)
    size = product([sizes[d] for d in dims])
    if (
        size != space.size
        or len(rows) != len(space.rows)
        or any(c.coefficient(space.inner) != 0 for c in rows)
    ):
        raise NotExpressible("reductions over different dimensions", source_line=source_line(node))
    local = Space(sizes, dims)
    x = reader.at(source, local.coordinates(rows, reader.limits()))
    x = value(cast(x, dtype or wide(x.dtype)))
    leaf = Reduction(kind, x)
    return reader.leaf(leaf, "i64" if kind.startswith("arg") else x.dtype)


def rule(table: dict[str, Rule], *names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        table.update({name if "::" in name else f"aten::{name}": function for name in names})
        return function

    return register


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _out(node: fx.Node) -> str:
    return dtype_of(node.meta["val"])


def _count(space: Space, dtype: str, less: float = 0) -> Expr:
    if isinstance(space.size, int):
        return Const(float(space.size - less), dtype)
    size = cast(Size(space.size), dtype)
    return call("sub", (size, Const(float(less), dtype)), dtype) if less else size


def _arith(op: str, *args: Expr) -> Expr:
    return call(op, args, args[0].dtype)


@rule(RULES, "sum", "prod", "amax", "amin", "any", "all", "argmax", "argmin")
def _plain(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    name = op_name(node)[6:]
    kind = {"amax": "max", "amin": "min", "any": "max", "all": "min"}.get(name, name)
    dtype = None if name.startswith("arg") else wide(_out(node))
    return cast(reduced(space, reader, node, at, kind, dtype=dtype), _out(node))


@rule(RULES, "mean")
def _mean(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    total = reduced(space, reader, node, at, "sum", dtype=wide(_out(node)))
    return cast(_arith("div", total, _count(space, total.dtype)), _out(node))


@rule(RULES, "linalg_vector_norm")
def _vector_norm(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    if len(node.args) > 1 and _args(node)[1] != 2:
        raise NotExpressible(f"vector norm of order {_args(node)[1]}")
    total = reduced(space, reader, node, at, "sum", lambda x: _arith("mul", x, x), wide(_out(node)))
    return cast(_arith("sqrt", total), _out(node))


def _moments(
    space: Space, reader: Reader, node: fx.Node, at: Coordinates, less: float = 0
) -> tuple[Expr, Expr]:
    """Return (mean, variance) with two passes: the squares are of centred values."""
    total = reduced(space, reader, node, at, "sum")
    mean = _arith("div", total, _count(space, total.dtype))

    def squared(x: Expr) -> Expr:
        centred = _arith("sub", x, mean)
        return _arith("mul", centred, centred)

    squares = reduced(space, reader, node, at, "sum", squared)
    return mean, _arith("div", squares, _count(space, total.dtype, less))


def _correction(node: fx.Node) -> float:
    value: Any = node.kwargs.get("correction", 1)
    return 1.0 if value is None else float(value)


@rule(RULES, "var")
def _var(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    return cast(_moments(space, reader, node, at, _correction(node))[1], _out(node))


@rule(PARTS, "var_mean")
def _var_mean(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    owner: Any = _args(node)[0]
    mean, variance = _moments(space, reader, owner, at, _correction(owner))
    return cast(mean if _args(node)[1] == 1 else variance, _out(node))


@rule(PARTS, "max", "min")
def _max_with_index(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    owner: Any = _args(node)[0]
    kind = op_name(owner)[6:]
    return reduced(space, reader, owner, at, f"arg{kind}" if _args(node)[1] == 1 else kind)


@rule(RULES, "_softmax", "_log_softmax")
def _softmax(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    source: Any = _args(node)[0]
    dim = _args(node)[1] % max(1, len(at))  # of a number: 0
    rows = tuple(c for d, c in enumerate(at) if d != dim)
    largest = reduced(space, reader, node, rows, "max")

    def shifted(x: Expr) -> Expr:
        return _arith("sub", x, largest)

    total = reduced(space, reader, node, rows, "sum", lambda x: _arith("exp", shifted(x)))
    x = shifted(cast(reader.at(source, at), largest.dtype))
    if op_name(node) == "aten::_log_softmax":
        return cast(_arith("sub", x, _arith("log", total)), _out(node))
    return cast(_arith("div", _arith("exp", x), total), _out(node))


@rule(RULES, "aios::rms_norm")
def _rms_norm(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    args: Any = [*node.args, *[None] * (4 - len(node.args))]
    source, weight = args[0], node.kwargs.get("weight", args[1])
    eps, early = node.kwargs.get("eps", args[2]), node.kwargs.get("scale_in_float32", args[3])
    total = reduced(space, reader, node, at[:-1], "sum", lambda x: _arith("mul", x, x))
    dtype = total.dtype
    mean = _arith("div", total, _count(space, dtype))
    scale = _arith("rsqrt", _arith("add", mean, Const(float(eps), dtype)))
    h = _arith("mul", cast(reader.at(source, at), dtype), scale)
    if weight is None:
        return cast(h, _out(node))
    w = cast(reader.broadcast(weight, at), dtype)
    h = h if early else cast(cast(h, _out(node)), dtype)
    return cast(_arith("mul", h, w), _out(node))


@rule(RULES, "aios::layer_norm")
def _layer_norm(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    args: Any = [*node.args, *[None] * (4 - len(node.args))]
    named = node.kwargs
    return _normalised(
        space, reader, node, at, at[:-1],
        (named.get("weight", args[1]), named.get("bias", args[2])),
        float(named.get("eps", args[3])),
    )  # fmt: skip


@rule(PARTS, "native_layer_norm")
def _native_layer_norm(space: Space, reader: Reader, node: fx.Node, at: Coordinates) -> Expr:
    owner: Any = _args(node)[0]
    rank = len(owner.args[1])
    if _args(node)[1] != 0:
        mean, variance = _moments(space, reader, owner, at[: len(at) - rank])
        eps = Const(float(owner.args[4]), variance.dtype)
        return mean if _args(node)[1] == 1 else _arith("rsqrt", _arith("add", variance, eps))
    return cast(
        _normalised(space, reader, owner, at, at[: len(at) - rank], owner.args[2:4],
                    float(owner.args[4])), _out(node))  # fmt: skip


def _normalised(
    space: Space, reader: Reader, node: fx.Node, at: Coordinates, rows: Coordinates,
    affine: Any, eps: float,
) -> Expr:  # fmt: skip
    mean, variance = _moments(space, reader, node, rows)
    dtype = mean.dtype
    scale = _arith("rsqrt", _arith("add", variance, Const(eps, dtype)))
    x = cast(reader.at(_args(node)[0], at), dtype)
    h = _arith("mul", _arith("sub", x, mean), scale)
    weight, bias = affine
    if weight is not None:
        h = _arith("mul", h, cast(reader.broadcast(weight, at), dtype))
    if bias is not None:
        h = _arith("add", h, cast(reader.broadcast(bias, at), dtype))
    value = node.meta["val"]
    return cast(h, dtype_of(value[0] if isinstance(value, (tuple, list)) else value))
