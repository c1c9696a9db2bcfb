"""Recognise layer normalisation as aios.layer_norm.

The native op returns statistics that no inference needs; spelled out it is nine launches. One op
with optional weight and bias is one kernel: one read, one write.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import (
    centred_on_mean,
    dtype_of,
    is_call,
    is_last,
    mean_of_last,
    only_user,
    product,
    quotients,
    rank_of,
    shape_of,
    squared,
    total,
    without_casts,
)

aten = torch.ops.aten
aios = torch.ops.aios


class Match(NamedTuple):
    """layer_norm(x, weight, bias, eps), whose value is `root`."""

    root: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float


@graph_pass(numerics="exact")
def raise_layer_norm(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite native_layer_norm over the last dimension, or its spelled-out form.

    Before::

        def f(x: "f32[T, 64]", w: "weight f32[64]", b: "weight f32[64]"):
            centred = aten.sub.Tensor(x, aten.mean.dim(x, [-1], True))
            variance = aten.mean.dim(aten.mul.Tensor(centred, centred), [-1], True)
            scale = aten.rsqrt.default(aten.add.Tensor(variance, 1e-05))
            return aten.add.Tensor(aten.mul.Tensor(aten.mul.Tensor(centred, scale), w), b)

    After::

        def f(x: "f32[T, 64]", w: "weight f32[64]", b: "weight f32[64]"):
            return aios.layer_norm.default(x, w, b, 1e-05)
    """
    hits = 0
    for node in list(graph.nodes):
        for found in (*_match_native(node), *_match_spelled(node, context)):
            if isinstance(found, Match):
                _rewrite(graph, found, context)
                hits += 1
            else:
                context.refuse(found)
    return hits


def _match_native(node: Any) -> list[Match | Refusal]:
    if not is_call(node, aten.native_layer_norm.default):
        return []
    x, widths, weight, bias, eps = node.args
    if len(widths) != 1:
        return [Refusal("layer norm over several dimensions", provenance.place(node))]
    values = [u for u in node.users if is_call(u, operator.getitem)]
    if any(u.args[1] != 0 for u in values if u.users):
        return [Refusal("the statistics of the layer norm are used", provenance.place(node))]
    return [Match(u, x, weight, bias, eps) for u in values if u.users]


def _match_spelled(variance: Any, context: PassContext) -> list[Match | Refusal]:
    """Match (x - mean(x)) / sqrt(variance + eps) from its variance."""
    centred = squared(mean_of_last(variance, context))
    x = centred_on_mean(centred, context)
    if x is None:
        x, centred = _variance(variance), None
    if x is None:
        return []
    if centred is None and _statistic(variance).kwargs.get("correction", 1) != 0:
        return [Refusal("layer norm with an unbiased variance", provenance.place(variance))]
    found: list[Match | Refusal] = []
    for quotient in quotients(variance, context):
        if not quotient.node.users or centred_on_mean(quotient.x, context) is not x:
            continue
        root, weight = _with_weight(quotient.node, product, context)
        root, bias = _with_weight(root, total, context)
        found.append(Match(root, x, weight, bias, quotient.eps))
    return found


def _variance(node: Any) -> Any:
    """Return x of var(x, -1, keepdim=True)."""
    statistic = _statistic(node)
    if statistic is None or not statistic.kwargs.get("keepdim"):
        return None
    x = statistic.args[0]
    return x if len(statistic.args) > 1 and is_last(statistic.args[1], rank_of(x)) else None


def _statistic(node: Any) -> Any:
    """Return the var or var_mean whose variance a node is."""
    if is_call(node, operator.getitem) and node.args[1] == 0:
        return node.args[0] if is_call(node.args[0], aten.var_mean.correction) else None
    return node if is_call(node, aten.var.correction) else None


def _with_weight(
    root: fx.Node, operands_of: Any, context: PassContext
) -> tuple[fx.Node, fx.Node | None]:
    """Take in a product or sum with a weight of the last dimension's width."""
    user = only_user(root)
    operands = operands_of(user)
    if user is not None and operands is not None and operands[0] is not operands[1]:
        other = without_casts(operands[1] if operands[0] is root else operands[0])
        if context.is_weight(other) and shape_of(other) == shape_of(root)[-1:]:
            return user, other
    return root, None


def _rewrite(graph: fx.Graph, match: Match, context: PassContext) -> None:
    root, x, weight, bias, eps = match
    with graph.inserting_before(root):
        new = context.call(
            graph,
            aios.layer_norm.default,
            x,
            weight,
            bias,
            eps,
            source=[root, *root.all_input_nodes],
        )
        if dtype_of(new) != dtype_of(root):
            new = context.call(
                graph, aten._to_copy.default, new, dtype=dtype_of(root), source=[root]
            )
    root.replace_all_uses_with(new)
