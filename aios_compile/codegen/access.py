"""From a kernel body to the expression of one element: views and copies become index arithmetic.

A Reader answers "what is this node's value at these coordinates" by walking the body backwards from
an output. Inputs become Loads with an address; pointwise nodes become Calls; reductions over one
dimension become Loads of a value that a loop computes. `movement.py` holds the rules of views.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from aios_compile.codegen.expression import Expr, Index, Load, walk
from aios_compile.codegen.linear_index import Linear, divided, remainder
from aios_compile.codegen.operand import Dim, Operand, dim_of, multiply
from aios_compile.codegen.pointwise_ops import IDENTITY, op_name, pointwise
from aios_compile.errors import CodegenError
from aios_compile.ir.provenance import source_line, source_lines

Coordinates = tuple[Linear, ...]


class NotExpressible(CodegenError):
    """A node of the body is not pointwise, a view or a reduction that this emitter knows."""


@dataclass(frozen=True)
class Access:
    """One read: element `address` (counted from the operand's pointer) of operand `operand`."""

    operand: int
    address: Linear


@dataclass(frozen=True)
class Reduction:
    """One value a row: `kind` (sum, prod, max, min, argmax, argmin) over the inner coordinate."""

    kind: str
    value: Expr


Leaf = Access | Reduction


@dataclass
class Reader:
    """Builds expressions over `leaves`: Load(i) stands for leaves[i].

    `ranges[d]` is the part [low, high) of dimension d that is computed; a rule that needs a cut
    inside it (the border between two parts of a cat) adds the place to `cuts`.
    """

    body: fx.GraphModule
    operands: Sequence[Operand]
    ranges: tuple[tuple[int, int | None], ...] = ()
    reduce: Callable[[Reader, fx.Node, Coordinates], Expr | None] | None = None
    leaves: list[Leaf] = field(default_factory=list)
    cuts: set[tuple[int, int]] = field(default_factory=set)
    memo: dict[tuple[fx.Node, Coordinates], Expr] = field(default_factory=dict)

    def at(self, node: fx.Node, coordinates: Coordinates) -> Expr:
        """Return the value of `node` at `coordinates`, one Linear a dimension of the node.

        Raises NotExpressible, with the model's source line, for a node that no rule knows.
        """
        key = (node, coordinates)
        if key not in self.memo:
            self.memo[key] = self._at(node, coordinates)
        return self.memo[key]

    def _at(self, node: fx.Node, coordinates: Coordinates) -> Expr:
        from aios_compile.codegen import movement, scatters

        if node.op == "placeholder":
            return self._load(node, coordinates)
        if self.reduce is not None:
            reduced = self.reduce(self, node, coordinates)
            if reduced is not None:
                return reduced
        assert scatters.MAX_INDICES  # its rules are registered
        moved = movement.read(self, node, coordinates)
        if moved is not None:
            return moved
        expr = pointwise(node, lambda arg: self.broadcast(arg, coordinates))
        if expr is None:
            what = node.format_node() if node.target is operator.getitem else op_name(node)
            raise NotExpressible(
                f"{what or node.target} is not a pointwise operation, a view or a reduction",
                source_line=source_line(node) or None,
            )
        return expr

    def broadcast(self, node: fx.Node, coordinates: Coordinates) -> Expr:
        """Return the value of an argument that broadcasts to the coordinates' rank."""
        sizes = shape_of(node)
        aligned = coordinates[len(coordinates) - len(sizes) :]
        return self.at(
            node, tuple(Linear() if s == 1 else c for s, c in zip(sizes, aligned, strict=True))
        )

    def _load(self, node: fx.Node, coordinates: Coordinates) -> Expr:
        index = placeholders(self.body).index(node)
        operand = self.operands[index]
        return self.leaf(Access(index, address_of(operand, coordinates)), operand.dtype)

    def leaf(self, leaf: Leaf, dtype: str) -> Load:
        """Return the Load of a leaf; equal leaves are one."""
        if leaf not in self.leaves:
            self.leaves.append(leaf)
        return Load(self.leaves.index(leaf), dtype)

    def limits(self) -> dict[int, int]:
        """Return the constant upper bounds of the coordinates."""
        return {d: high for d, (_, high) in enumerate(self.ranges) if high is not None}


def varies(expr: Expr, leaves: Sequence[Leaf], dim: int) -> bool:
    """Return whether a value changes along dimension `dim`, through its loads' addresses too."""
    for e in walk(expr):
        if isinstance(e, Load):
            leaf = leaves[e.index]
            if isinstance(leaf, Access) and any(
                varies(atom, leaves, dim) for atom in leaf.address.atoms()
            ):
                return True
        elif isinstance(e, Index) and e.dim == dim:
            return True
    return False


def placeholders(body: fx.GraphModule) -> list[fx.Node]:
    """Return the inputs that are tensors: a size is no operand, a kernel gets it with `n`."""
    holders = (n for n in body.graph.nodes if n.op == "placeholder")
    return [n for n in holders if isinstance(n.meta.get("val"), torch.Tensor)]


def outputs(body: fx.GraphModule) -> list[fx.Node]:
    """Return the output nodes of a body."""
    result: Any = body.graph.output_node().args[0]
    return list(result) if isinstance(result, (tuple, list)) else [result]


def noun(body: fx.GraphModule, otherwise: str) -> str:
    """Return a name for a kernel: the operations that it computes, e.g. `add_rms_norm`."""
    names = [op_name(n).split("::")[-1].strip("_") for n in body.graph.nodes if is_operation(n)]
    names = list(dict.fromkeys(names))
    return "_".join(names[:4]) + ("_etc" if len(names) > 4 else "") if names else otherwise


def is_operation(node: fx.Node) -> bool:
    """Return whether a node computes something (is no view, no copy, no part of a tuple)."""
    from aios_compile.codegen import movement

    name = op_name(node)
    return bool(name) and name not in movement.RULES and name.split("::")[-1] not in IDENTITY


def shape_of(node: Any) -> tuple[Dim, ...]:
    """Return the sizes of a node's value."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node} is no tensor"
    return tuple(dim_of(s) for s in value.shape)


def address_of(operand: Operand, coordinates: Coordinates) -> Linear:
    """Return the address of an element: by strides, or inside a packed layout.

    Packed layouts are rows16 and pairs16 (codegen/packing.py). Raises NotExpressible for others.
    """
    if operand.packed == "pairs16":
        (row, column), depth = coordinates, operand.shape[1]
        assert isinstance(depth, int), "weights have fixed sizes"
        block = divided(row, 16).times((depth + 1) // 2 * 32).plus(divided(column, 2).times(32))
        return block.plus(remainder(row, 16).times(2)).plus(remainder(column, 2))
    if operand.packed == "rows16":
        (row, column), width = coordinates, operand.shape[1]
        block = divided(row, 16).times(multiply(width, 16))
        return block.plus(column.times(16)).plus(remainder(row, 16))
    if operand.packed:
        raise NotExpressible(f"operand {operand.name} is packed as {operand.packed}")
    address = Linear()
    for coordinate, size, stride in zip(coordinates, operand.shape, operand.strides, strict=True):
        address = address.plus(Linear() if size == 1 else coordinate.times(stride))
    return address


store_address = address_of  # outputs are never packed


def model_lines(body: fx.GraphModule) -> tuple[str, ...]:
    """Return the model's source lines that a body computes, in order, each once."""
    lines = (line for n in body.graph.nodes if n.op == "call_function" for line in source_lines(n))
    return tuple(dict.fromkeys(lines))
