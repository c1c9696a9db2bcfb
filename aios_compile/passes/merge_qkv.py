"""Project queries, keys and values by one matrix.

Pays two launches and two reads of x a layer, and one wide matrix streams better than three narrow
ones at batch 1. The loader concatenates the weights, layer by layer; nothing is held twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fusion_groups import is_call
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.merge_linears import LINEARS, merge, refusal_to_merge
from aios_compile.passes.token_mixing import ATTENTION

aten = torch.ops.aten
aios = torch.ops.aios
BORDERS = (*LINEARS, aten.mm.default, aten.addmm.default, aten.bmm.default)


class Match(NamedTuple):
    linears: list[fx.Node]


def _match(node: fx.Node, context: PassContext) -> Match | Refusal | None:
    """Collect the linears over node's input that feed attention, led by the first of them."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    group = [u for u in x.users if is_call(u, *LINEARS) and u.args[0] is x]
    group = sorted((u for u in group if _feeds_attention(u)), key=order.__getitem__)
    if len(group) < 2 or node is not group[0]:
        return None
    refusal = refusal_to_merge(group, context)
    return refusal or Match(group)


def _feeds_attention(linear: fx.Node) -> bool:
    """Return whether a value reaches attention before it meets another matrix product."""
    pending, seen = list(linear.users), set[fx.Node]()
    while pending:
        node = pending.pop()
        if is_call(node, *ATTENTION):
            return True
        if node not in seen and node.op == "call_function" and not is_call(node, *BORDERS):
            seen.add(node)
            pending += node.users
    return False


@graph_pass(numerics="exact")
def merge_qkv(graph: fx.Graph, context: PassContext) -> int:
    """Replace the linears of one input that feed attention by one linear and slices of it.

    Before::

        def f(x: "f32[T, 64]", wq: "weight f32[64, 64]", wk: "weight f32[32, 64]",
              wv: "weight f32[32, 64]"):
            q = aten.view.default(aios.linear.default(x, wq, None), [-1, 4, 16])
            k = aten.view.default(aios.linear.default(x, wk, None), [-1, 2, 16])
            v = aten.view.default(aios.linear.default(x, wv, None), [-1, 2, 16])
            return aios.attention.default(q, k, v, 0.25, None, None, None, None)

    After::

        def f(x: "f32[T, 64]", qkv_proj_weight: "weight f32[128, 64]"):
            y = aios.linear.default(x, qkv_proj_weight, None)
            q = aten.view.default(aten.slice.Tensor(y, 1, 0, 64), [-1, 4, 16])
            k = aten.view.default(aten.slice.Tensor(y, 1, 64, 96), [-1, 2, 16])
            v = aten.view.default(aten.slice.Tensor(y, 1, 96, 128), [-1, 2, 16])
            return aios.attention.default(q, k, v, 0.25, None, None, None, None)
    """
    hits, merged = 0, set[fx.Node]()
    for node in [n for n in graph.nodes if is_call(n, *LINEARS)]:
        match = None if node in merged else _match(node, context)
        if isinstance(match, Refusal):
            context.refuse(match)
        elif match is not None:
            merge(graph, match.linears, "qkv_proj", context)
            merged.update(match.linears)
            hits += 1
    return hits
