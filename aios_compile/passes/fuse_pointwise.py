"""Fuse what no template took: maximal groups over one iteration space.

Pays one launch, one write and one read of each value that stays inside. Two kinds: "pointwise" (any
elementwise ops; copies, slices, cats and ranges between them are index arithmetic) and
"row_reduction" (reductions over the last dimension with what comes before and after over the same
rows: a spelled-out softmax, a norm that no pass knows). A result has a value for each point of the
space; results of a reduction may also have one for each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.ir.fusion import fuse_nodes, is_convex
from aios_compile.passes.context import PassContext
from aios_compile.passes.fusion_groups import (
    NORMS,
    REDUCTIONS,
    is_call,
    is_pointwise,
    is_view,
    kernel_name,
    shape_of,
)
from aios_compile.passes.graph_pass import graph_pass

aten = torch.ops.aten
# Copies and ranges that may stand inside a group: each element comes from one place.
MOVEMENTS = (
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.arange.start_step,
    aten.arange.default,
    aten.full.default,
    aten.scalar_tensor.default,
    aten.repeat.default,
    aten.flip.default,
    aten.tril.default,
    aten.triu.default,
    aten.index_select.default,
)


class Match(NamedTuple):
    nodes: list[fx.Node]
    kind: str


class Space(NamedTuple):
    """What a group iterates over. `rows` is set for a reduction: all but the last dimension."""

    shape: tuple[Any, ...]
    rows: tuple[Any, ...] | None

    def holds(self, node: fx.Node) -> bool:
        """Return whether a node is computed once for each point (or row) of the space."""
        shape = shape_of(node)
        if self.rows is None:
            return is_pointwise(node) and shape == self.shape
        if is_reduction(node):
            return shape_of(node.args[0]) == self.shape  # type: ignore[arg-type]
        return is_pointwise(node) and shape in (self.shape, (*self.rows, 1))


def is_reduction(node: Any) -> bool:
    """Return whether a node reduces over its last dimension only (norms and softmax included)."""
    if is_call(node, *NORMS):
        return True
    if not is_call(node, *REDUCTIONS) or len(node.args) < 2:
        return False
    rank = len(shape_of(node.args[0]))
    dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    return [int(d) % rank for d in dims] == [rank - 1] if rank and None not in dims else False


def _match(seed: fx.Node) -> Match | None:
    """Grow the largest convex group around a seed."""
    reduces = is_reduction(seed)
    shape = shape_of(seed.args[0] if reduces else seed)  # type: ignore[arg-type]
    space = Space(shape, shape[:-1] if reduces else None)
    group = _grow(seed, space)
    if not _results_fit(group, space):
        group = _absorbed(seed)
    group = _without_outer_views(group)
    if len(group) < 2 or not _results_fit(group, space):
        return None
    order = {n: i for i, n in enumerate(seed.graph.nodes)}
    nodes = sorted(group, key=order.__getitem__)
    return Match(nodes, "row_reduction" if reduces else "pointwise")


def _grow(seed: fx.Node, space: Space) -> set[fx.Node]:
    group, changed = {seed}, True
    while changed:
        changed = False
        for node in list(_neighbours(group, space.shape)):
            if not _may_join(node, group, space) or not is_convex([*group, node]):
                continue
            group.add(node)
            changed = True
    return group


def _absorbed(seed: fx.Node) -> set[fx.Node]:
    """Return a seed with what it alone reads."""
    group, changed = {seed}, True
    while changed:
        more = {p for n in group for p in n.all_input_nodes if p not in group}
        more = {p for p in more if _is_internal(p, group) and is_convex([*group, p])}
        changed = bool(more)
        group |= more
    return group


def _neighbours(group: set[fx.Node], shape: tuple[Any, ...]) -> Iterator[fx.Node]:
    """Yield producers, consumers and siblings (readers of full-size data that the group reads)."""
    seen = set(group)
    for member in sorted(group):
        producers = member.all_input_nodes
        siblings = [u for p in producers if _is_data(p, shape) for u in p.users]
        for node in (*producers, *member.users, *siblings):
            if node not in seen and node.op == "call_function":
                seen.add(node)
                yield node


def _is_data(node: fx.Node, shape: tuple[Any, ...]) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and shape_of(node) == shape


def _may_join(node: fx.Node, group: set[fx.Node], space: Space) -> bool:
    if _is_internal(node, group):
        return True
    return isinstance(node.meta.get("val"), torch.Tensor) and space.holds(node)


def _is_internal(node: fx.Node, group: set[fx.Node]) -> bool:
    """Return whether a producer may be computed again wherever the group reads it."""
    if not node.users or any(u not in group for u in node.users):
        return False
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return is_pointwise(node) or is_view(node) or is_call(node, *MOVEMENTS)


def _without_outer_views(group: set[fx.Node]) -> set[fx.Node]:
    """Leave views of outside values outside: they are free there."""
    kept = set(group)
    while True:
        outer = {n for n in kept if is_view(n) and not any(s in kept for s in n.all_input_nodes)}
        if not outer:
            return kept
        kept -= outer


def _results_fit(group: set[fx.Node], space: Space) -> bool:
    """Return whether all values that escape have a value a point (or a row) of the space."""
    results = [n for n in group if any(u not in group for u in n.users)]
    shapes = {space.shape} if space.rows is None else {space.shape, space.rows, (*space.rows, 1)}
    return {shape_of(n) for n in results} <= shapes


@graph_pass(numerics="exact")
def fuse_pointwise(graph: fx.Graph, context: PassContext) -> int:
    """Fuse maximal groups of elementwise ops, and reductions with the ops around them.

    Before::

        def f(positions: "i64[T, 1]", inverse: "weight f32[8]"):
            angles = aten.mul.Tensor(positions, inverse)
            both = aten.cat.default([angles, angles], -1)
            return aten.cos.default(both), aten.sin.default(both)

    After::

        def f(positions: "i64[T, 1]", inverse: "weight f32[8]"):
            @kernel("pointwise")
            def mul_cat_cos_sin(positions, inverse):
                angles = aten.mul.Tensor(positions, inverse)
                both = aten.cat.default([angles, angles], -1)
                return aten.cos.default(both), aten.sin.default(both)

            return mul_cat_cos_sin(positions, inverse)
    """
    hits, done = 0, set[fx.Node]()
    reductions = [n for n in graph.nodes if is_reduction(n)]
    elementwise = [n for n in reversed(graph.nodes) if is_pointwise(n)]
    for seed in (*reductions, *elementwise):
        match = None if seed in done else _match(seed)
        if match is not None:
            fuse_nodes(graph, match.nodes, kernel_name(match.nodes), match.kind)
            done.update(match.nodes)
            hits += 1
    return hits
