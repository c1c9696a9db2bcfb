"""Normalise the rows of x inside of the linear that reads them.

Pays a launch, one write and one read of x for each norm: 1 / rms(x) is one number a token, so the
linear multiplies its sums by it at the end, and adds the squares of x as they pass. On the C++
target the norm is a phase of a few microseconds whose row every thread would compute again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.fusion import fuse_nodes, is_convex
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fuse_linear_epilogue import Match, epilogue_of
from aios_compile.passes.fusion_groups import RESHAPES, is_call, kernel_name
from aios_compile.passes.graph_pass import graph_pass

aten, aios = torch.ops.aten, torch.ops.aios
LINEARS: dict[Any, str] = {
    aios.linear.default: "linear",
    aios.quantized_linear.default: "quantized_linear",
}


def _match(root: fx.Node) -> list[fx.Node] | Refusal | None:
    """Match rms_norm -> reshapes -> linear; return what stands before the linear."""
    chain, node = list[fx.Node](), root.args[0]
    while is_call(node, *RESHAPES):
        chain.append(node)  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[union-attr]
    line = provenance.place(root)
    if is_call(node, aios.layer_norm.default):
        return Refusal("a layer norm takes the mean off before the product", line)
    if not is_call(node, aios.rms_norm.default):
        return None
    assert isinstance(node, fx.Node)
    chain.append(node)
    if any(len(n.users) > 1 for n in chain):
        return Refusal("the normalised rows have another user", line)
    if node.meta["val"].dtype != torch.float32:
        return Refusal(f"the norm rounds its result to {node.meta['val'].dtype}", line)
    if is_call(node.args[0], aten.index_select.default):
        return Refusal("the norm gathers the rows that it reads", line)
    reason = _other_rows(node, chain, root)
    return Refusal(reason, line) if reason else chain[::-1]


def _other_rows(norm: fx.Node, chain: list[fx.Node], root: fx.Node) -> str:
    """Return why the rows that the norm reads are not the linear's as they lie, "" if they are."""
    source, weight = norm.args[:2]
    assert isinstance(source, fx.Node) and isinstance(root.args[0], fx.Node)
    x = source.meta["val"]
    rows = [s for s in x.shape[:-1] if not (isinstance(s, int) and s == 1)]
    widths = {n.meta["val"].shape[-1] for n in (*chain, root.args[0])}
    if x.dim() < 2 or len(rows) > 1 or len(widths) > 1:
        return "the norm's rows are not the linear's"
    if x.stride()[-1] != 1:
        return "the norm reads rows with gaps"
    if isinstance(weight, fx.Node) and weight.meta["val"].stride() != (1,):
        return "the norm's weight has gaps"
    return ""


@graph_pass(numerics="reassociates", target="triton")
def fuse_norm_into_linear(graph: fx.Graph, context: PassContext) -> int:
    """Fuse a norm with the linear that alone reads it, and with the linear's tail.

    Before::

        def f(x: "f32[T, 64]", g: "weight f32[64]", w: "weight f32[192, 64]"):
            y = aios.linear.default(aios.rms_norm.default(x, g, 1e-6, True), w, None)
            gate = aten.slice.Tensor(y, 1, 0, 96)
            up = aten.slice.Tensor(y, 1, 96, 192)
            return aios.gated_activation.default(gate, up, "silu")

    After::

        def f(x: "f32[T, 64]", g: "weight f32[64]", w: "weight f32[192, 64]"):
            @kernel("linear")
            def rms_norm_linear_gated_activation(x, g, w):
                y = aios.linear.default(aios.rms_norm.default(x, g, 1e-6, True), w, None)
                gate = aten.slice.Tensor(y, 1, 0, 96)
                up = aten.slice.Tensor(y, 1, 96, 192)
                return aios.gated_activation.default(gate, up, "silu")

            return rms_norm_linear_gated_activation(x, g, w)
    """
    hits = 0
    for root in [n for n in graph.nodes if is_call(n, *LINEARS)]:
        before = _match(root)
        if isinstance(before, Refusal):
            context.refuse(before)
        elif before is not None:
            tail = epilogue_of(root)
            if isinstance(tail, Refusal):
                context.refuse(tail)
            nodes = [*before, *(tail.nodes if isinstance(tail, Match) else [root])]
            if not is_convex(nodes):
                nodes = [*before, root]
            fuse_nodes(graph, nodes, kernel_name(nodes), LINEARS[root.target])
            hits += 1
    return hits
