"""Recognise activation(gate) * up as aios.gated_activation: SwiGLU, GeGLU and their kin.

Two launches become one, and the op tells merge_gate_up which two projections share their input and
fuse_linear_epilogue what their common epilogue is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import dtype_of, is_call, product, shape_of

aten = torch.ops.aten
aios = torch.ops.aios


class Match(NamedTuple):
    """activation(gate) * up, the activation by its name in the op table."""

    gate: fx.Node
    up: fx.Node
    activation: str


@graph_pass(numerics="exact")
def raise_gated_mlp(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite act(gate) * up, with act in silu, gelu, tanh-gelu, relu or sigmoid.

    The operands stand in any order; silu may be spelled gate * sigmoid(gate).

    Before::

        def f(gate: "f32[T, 64]", up: "f32[T, 64]"):
            return aten.mul.Tensor(up, aten.silu.default(gate))

    After::

        def f(gate: "f32[T, 64]", up: "f32[T, 64]"):
            return aios.gated_activation.default(gate, up, "silu")
    """
    hits = 0
    for node in list(graph.nodes):
        found = _match(node)
        if isinstance(found, Match):
            with graph.inserting_before(node):
                new = context.call(
                    graph, aios.gated_activation.default, *found, source=[node, found.gate]
                )
            node.replace_all_uses_with(new)
            hits += 1
        elif found is not None:
            context.refuse(found)
    return hits


def _match(node: fx.Node) -> Match | Refusal | None:
    factors = product(node)
    if factors is None or not node.users or _activation(node) is not None:
        return None
    reasons = []
    for activated, up in (factors, factors[::-1]):
        found = _activation(activated)
        if found is None:
            continue
        gate, name = found
        reason = _near_miss(node, activated, gate, up)
        if reason is None:
            return Match(gate, up, name)
        reasons.append(Refusal(reason, provenance.place(node)))
    return reasons[0] if reasons else None


def _near_miss(node: fx.Node, activated: fx.Node, gate: fx.Node, up: Any) -> str | None:
    if up is activated or up is gate:
        return "a gated activation of one value with itself"
    if len(activated.users) > 1:
        return "the activation of the gate is used elsewhere too"
    if not shape_of(gate) == shape_of(up) == shape_of(node):
        return "the gate is broadcast over what it gates"
    if not dtype_of(gate) == dtype_of(up) == dtype_of(node):
        return "the gate and what it gates have different dtypes"
    return None


def _activation(node: Any) -> tuple[fx.Node, str] | None:
    """Return (x, name) of an activation of x."""
    if is_call(node, aten.gelu.default):
        approximate = node.kwargs.get("approximate", "none")
        return node.args[0], "gelu_tanh" if approximate == "tanh" else "gelu"
    for target, name in (
        (aten.silu.default, "silu"),
        (aten.relu.default, "relu"),
        (aten.sigmoid.default, "sigmoid"),
    ):
        if is_call(node, target):
            return node.args[0], name
    factors = product(node)
    if factors is not None:
        for x, gate in (factors, factors[::-1]):
            if is_call(gate, aten.sigmoid.default) and gate.args[0] is x:
                return x, "silu"
    return None
