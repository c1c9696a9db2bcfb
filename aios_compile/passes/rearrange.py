"""Find out by running how a value was moved around, and bring it to [T, heads, width].

Queries, keys and values reach attention through transposes, reshapes, broadcasts of key heads to
query heads and copies. Running these on the numbers 0, 1, 2, ... tells what they do together.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from aios_compile.passes.concrete import Concrete, Unknown
from aios_compile.passes.context import PassContext
from aios_compile.passes.match import RESHAPES, is_call, shape_of

aten = torch.ops.aten
MOVES = (
    *RESHAPES,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.select.int,
    aten.slice.Tensor,
    aten.clone.default,
    aten.repeat.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
TOKENS = torch.arange(5)


class Source(NamedTuple):
    """Where [T, groups, width] comes from: base, its dims in that order, ones dropped."""

    base: fx.Node
    order: tuple[int, ...]
    groups: int


def chain(node: Any, *extra: Any) -> list[fx.Node]:
    """Return a node and the nodes behind it as far as only moves (and `extra` ops) lie between."""
    found = [node]
    while is_call(node, *MOVES, *extra) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        found.append(node)
    return found


def numbered(node: fx.Node, values: Concrete) -> Tensor:
    """Return 0, 1, 2, ... in the shape of a node."""
    sizes = [values.size(s) for s in node.meta["val"].shape]
    return torch.arange(int(torch.tensor(sizes).prod())).reshape(sizes)


def keeps_order(node: fx.Node, base: fx.Node, context: PassContext, columns: int) -> bool:
    """Return whether `node` holds `base` without its last `columns` columns, in the same order."""
    values = Concrete(context, TOKENS)
    try:
        numbers = numbered(base, values)
        values.values[base] = numbers
        wanted = numbers[..., : numbers.shape[-1] - columns]
        return torch.equal(values.value(node).flatten(), wanted.flatten())
    except Unknown:
        return False


def source_of(
    node: fx.Node, dims: tuple[int, int, int], context: PassContext, *, far: bool = True
) -> Source | None:
    """Return the farthest source of a value whose token, head and width dims are `dims`.

    The other dims have size 1. Fewer groups than heads means that consecutive heads were equal.
    far: look behind moves; else the value itself is taken, with all of its heads.
    """
    for base in reversed(chain(node)) if far else [node]:
        if not shape_of(base):
            continue
        values = Concrete(context, TOKENS)
        try:
            numbers = numbered(base, values)
            values.values[base] = numbers
            moved = _three(values.value(node), dims)
        except Unknown:
            continue
        found = None if moved is None else _plan(base, numbers, moved)
        if found is not None:
            return found
    return None


def _three(value: Tensor, dims: tuple[int, int, int]) -> Tensor | None:
    order = [d % value.dim() for d in dims]
    rest = [d for d in range(value.dim()) if d not in order]
    if any(value.shape[d] != 1 for d in rest):
        return None
    return value.permute(*order, *rest).flatten(2)


def _plan(base: fx.Node, numbers: Tensor, moved: Tensor) -> Source | None:
    tokens, heads, width = moved.shape
    groups, uneven = divmod(numbers.numel(), tokens * width)
    if uneven or groups == 0 or heads % groups:
        return None
    kept = moved[:, :: heads // groups]
    if not torch.equal(kept.repeat_interleave(heads // groups, 1), moved):
        return None
    large = [d for d in range(numbers.dim()) if numbers.shape[d] != 1]
    ones = [d for d in range(numbers.dim()) if numbers.shape[d] == 1]
    for order in itertools.permutations(large):
        turned = numbers.permute(*ones, *order)
        sizes = [s for s in turned.shape if s != 1]
        same = sizes == [s for s in kept.shape if s != 1] or list(order) == large
        if same and torch.equal(turned.reshape(kept.shape), kept):
            return Source(base, (*ones, *order), groups)
    return None


def emit(graph: fx.Graph, source: Source, width: int, context: PassContext) -> fx.Node:
    """Insert the views that bring a source to [T, groups, width]."""
    node = source.base
    if source.order != tuple(sorted(source.order)):
        order = list(source.order)
        node = context.call(graph, aten.permute.default, node, order, source=[node])
    if len(shape_of(node)) != 3 or shape_of(node)[1:] != (source.groups, width):
        sizes = [-1, source.groups, width]
        node = context.call(graph, aten.view.default, node, sizes, source=[node])
    return node
