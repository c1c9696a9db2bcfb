"""Project gate and up by one matrix.

Pays one launch and one read of x a layer; the gated activation can then become the epilogue of the
one linear (fuse_linear_epilogue), which saves writing and reading both halves. The loader
concatenates the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fusion_groups import is_call
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.merge_linears import LINEARS, merge, refusal_to_merge

aios = torch.ops.aios


class Match(NamedTuple):
    gate: fx.Node
    up: fx.Node


def _match(node: fx.Node, context: PassContext) -> Match | Refusal | None:
    gate, up = node.args[0], node.args[1]
    if not (is_call(gate, *LINEARS) and is_call(up, *LINEARS)):
        return None
    assert isinstance(gate, fx.Node) and isinstance(up, fx.Node)
    line = provenance.place(node)
    if gate is up:
        return Refusal("gate and up are one projection", line)
    if gate.args[0] is not up.args[0]:
        return Refusal("gate and up project different inputs", line)
    if len(gate.users) > 1 or len(up.users) > 1:
        return Refusal("gate or up has another user", line)
    return refusal_to_merge([gate, up], context) or Match(gate, up)


@graph_pass(numerics="exact")
def merge_gate_up(graph: fx.Graph, context: PassContext) -> int:
    """Replace the two linears of a gated activation by one linear and slices of it.

    Before::

        def f(x: "f32[T, 64]", wg: "weight f32[96, 64]", wu: "weight f32[96, 64]"):
            gate = aios.linear.default(x, wg, None)
            up = aios.linear.default(x, wu, None)
            return aios.gated_activation.default(gate, up, "silu")

    After::

        def f(x: "f32[T, 64]", gate_up_proj_weight: "weight f32[192, 64]"):
            y = aios.linear.default(x, gate_up_proj_weight, None)
            gate = aten.slice.Tensor(y, 1, 0, 96)
            up = aten.slice.Tensor(y, 1, 96, 192)
            return aios.gated_activation.default(gate, up, "silu")
    """
    hits = 0
    for node in graph.find_nodes(op="call_function", target=aios.gated_activation.default):
        match = _match(node, context)
        if isinstance(match, Refusal):
            context.refuse(match)
        elif match is not None:
            order = list(graph.nodes)
            first_gate = order.index(match.gate) < order.index(match.up)
            _merge(graph, match, first_gate, context)
            hits += 1
    return hits


def _merge(graph: fx.Graph, match: Match, first_gate: bool, context: PassContext) -> None:
    if not first_gate:  # the halves are always gate, up; the merged linear stands at the first
        match.up.prepend(match.gate)
    merge(graph, [match.gate, match.up], "gate_up_proj", context)
