"""Recognise rotary position embedding as aios.rope on x[..., T, H, D].

Slices, negation, concatenation, two products and a sum, for queries and keys each: one op is one
pass over the heads, and fuse_qk_norm_rope_kv_write takes it further. Spellings differ in how the
pairs are laid out (halves or neighbours), in the width of the tables and in the order of heads and
tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import dtype_of, is_call, positive, rank_of, shape_of
from aios_compile.passes.rotation import Rotation, rotation

aten = torch.ops.aten
aios = torch.ops.aios
COMPLEX = (aten.view_as_complex.default, aten.polar.default, aten.complex.default)


class Match(NamedTuple):
    """A rotation and where tokens and heads lie in its input."""

    rotation: Rotation
    token_dim: int
    head_dim: int | None  # None: one head, no dimension for it


@graph_pass(numerics="exact")
def raise_rope(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite rotations by tables that depend on the token as aios.rope.

    Half-width tables are widened; where heads stand before tokens the input is transposed, and
    back, which eliminate_views cancels; dimensions that pass through are taken in.

    Before::

        def f(x: "f32[T, 4, 64]", c: "f32[T, 64]", s: "f32[T, 64]"):
            low = aten.slice.Tensor(x, 2, 0, 32)
            high = aten.slice.Tensor(x, 2, 32, 9223372036854775807)
            turned = aten.cat.default([aten.neg.default(high), low], -1)
            straight = aten.mul.Tensor(x, aten.unsqueeze.default(c, -2))
            return aten.add.Tensor(straight, aten.mul.Tensor(turned, aten.unsqueeze.default(s, -2)))

    After::

        def f(x: "f32[T, 4, 64]", c: "f32[T, 64]", s: "f32[T, 64]"):
            return aios.rope.default(x, c, s, False)
    """
    hits = 0
    for node in reversed(list(graph.nodes)):
        if not node.users:
            continue
        found = _match(node)
        if isinstance(found, Match):
            _rewrite(graph, node, found, context)
            hits += 1
        elif found is not None:
            context.refuse(found)
    return hits


def _match(node: Any) -> Match | Refusal | None:
    if is_call(node, *COMPLEX):
        reason = "a rotary embedding by complex numbers is not recognised"
        return Refusal(reason, provenance.place(node))
    found = rotation(node)
    if found is None:
        return None
    rank, shape = rank_of(found.x), shape_of(found.x)
    if shape_of(node) != shape:
        reason = "the rotary tables have more dimensions than what they rotate"
        return Refusal(reason, provenance.place(node))
    tables = [_aligned(t, rank) for t in (found.cos, found.sin)]
    moving = [d for d in range(rank - 1) if any(t[d] != 1 for t in tables)]
    if len(moving) != 1 or any(t[moving[0]] != shape[moving[0]] for t in tables):
        reason = "the rotary tables do not depend on the token alone"
        return Refusal(reason, provenance.place(node))
    token = moving[0]
    if rank == 2:
        return Match(found, token, None)
    head = rank - 2 if token == rank - 3 else rank - 3 if token == rank - 2 else None
    if head is None:
        return Refusal("heads do not stand beside tokens", provenance.place(node))
    return Match(found, token, head)


def _aligned(table: fx.Node, rank: int) -> list[Any]:
    shape = list(shape_of(table))
    return [1] * (rank - len(shape)) + shape


def _rewrite(graph: fx.Graph, node: fx.Node, match: Match, context: PassContext) -> None:
    found, token, head = match
    rank = rank_of(found.x)

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return context.call(graph, target, *args, source=[node], **kwargs)

    def table(value: fx.Node) -> fx.Node:
        value = _without_heads(value, None if head is None else head - rank, call)
        if shape_of(value)[-1] == found.width:
            return value
        if not found.interleaved:
            return call(aten.cat.default, [value, value], -1)
        column = call(aten.unsqueeze.default, value, -1)
        pairs = call(aten.cat.default, [column, column], -1)
        sizes = [s if isinstance(s, int) else -1 for s in value.meta["val"].shape]
        return call(aten.view.default, pairs, [*sizes[:-1], found.width])

    with graph.inserting_before(node):
        x = found.x
        if dtype_of(x) != dtype_of(node):
            x = call(aten._to_copy.default, x, dtype=dtype_of(node))
        order = list(range(rank))
        if head is None:
            x = call(aten.unsqueeze.default, x, -2)
        elif head < token:
            order[head], order[token] = token, head
            x = call(aten.permute.default, x, order)
        new = call(aios.rope.default, x, table(found.cos), table(found.sin), found.interleaved)
        if head is None:
            new = call(aten.squeeze.dim, new, -2)
        elif head < token:
            new = call(aten.permute.default, new, order)
    node.replace_all_uses_with(new)


def _without_heads(table: Any, head: int | None, call: Any) -> fx.Node:
    """Drop a table's dimension of one head, or undo the unsqueeze that made it."""
    rank = rank_of(table)
    if head is None or rank < -head:
        return table  # type: ignore[no-any-return]
    if is_call(table, aten.unsqueeze.default) and positive(table.args[1], rank) == rank + head:
        return table.args[0]  # type: ignore[no-any-return]
    return call(aten.squeeze.dim, table, head)  # type: ignore[no-any-return]
