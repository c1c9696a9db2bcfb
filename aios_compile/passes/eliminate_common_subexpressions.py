"""Compute each value once.

Rotary tables are unsqueezed for queries and again for keys, views are repeated for each projection;
two copies of one value also keep a pattern from seeing that its operands are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import placeholders
from aios_compile.passes.context import PassContext
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import value_of

aten = torch.ops.aten
COMMUTE = (aten.mul.Tensor, aten.add.Tensor)


@graph_pass(numerics="exact")
def eliminate_common_subexpressions(graph: fx.Graph, context: PassContext) -> int:
    """Merge nodes of the same target and arguments, and region inputs that are always equal.

    Before::

        def f(x: "f32[T, 64]", c: "f32[T, 64]"):
            a = aten.mul.Tensor(x, aten.unsqueeze.default(c, 0))
            b = aten.mul.Tensor(aten.unsqueeze.default(c, 0), x)
            return aten.sub.Tensor(aten.exp.default(a), b)

    After::

        def f(x: "f32[T, 64]", c: "f32[T, 64]"):
            a = aten.mul.Tensor(x, aten.unsqueeze.default(c, 0))
            return aten.sub.Tensor(aten.exp.default(a), a)
    """
    hits = _merge_inputs(graph, context)
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.users or _is_random(node):
            continue
        first = seen.setdefault(_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            hits += 1
    return hits


def _merge_inputs(graph: fx.Graph, context: PassContext) -> int:
    """Use one region input for all that every call binds to the same outer value."""
    if not context.region:
        return 0
    calls, hits = context.module.calls(context.region), 0
    seen: dict[tuple[Any, ...], fx.Node] = {}
    for i, node in enumerate(placeholders(graph)):
        first = seen.setdefault(tuple(call.args[i] for call in calls), node)
        if first is not node and node.users:
            node.replace_all_uses_with(first)
            hits += 1
    return hits


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _key(node: fx.Node) -> Any:
    args: Any = _hashable(node.args)
    if node.target in COMMUTE and len(node.args) == 2 and not node.kwargs:
        args = tuple(sorted(args, key=str))
    value = value_of(node)
    dtype = None if value is None else value.dtype
    return node.target, args, _hashable(node.kwargs), dtype


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    return value if isinstance(value, fx.Node) else (type(value), value)
