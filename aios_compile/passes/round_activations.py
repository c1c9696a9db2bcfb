"""Multiply bf16 weights and keys by rounded activations, where processors have dot products.

Pays in arithmetic: AVX512-BF16 multiplies two pairs of bf16 a lane where a fused multiply-add
takes one float, so prefill of bf16 weights has twice the peak, and decode widens nothing. Weights
stay as they are; sums stay float32. An activation loses what transformers' own bf16 loses, but only
here, not after every operation; tests/compiled/test_bf16.py holds the error of whole models against
theirs. Matrices of a few rows (a mixture's router) keep float32 activations: rounding them saves
nothing and could choose another expert.

Attention is marked likewise (`rounded`): its queries and probabilities are rounded to bf16 over a
bf16 cache, and to 16 bits under a scale of their own over int8 codes, which need byte products.

What is proven is the rewrite, with exact activations (ir/evaluate.py). To keep float32 activations:
AIOS_DISABLE=round_activations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.attention_reference import can_round
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.quantize_weights import MIN_ROWS

aios = torch.ops.aios


class Match(NamedTuple):
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def _match(node: fx.Node, context: PassContext) -> Match | Refusal | None:
    line = provenance.place(node)
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    assert bias is None or isinstance(bias, fx.Node)
    value = weight.meta["val"]
    if value.dtype != torch.bfloat16 or x.meta["val"].dtype != torch.float32:
        return None
    if not context.is_weight(weight):
        return Refusal("a weight is computed in the graph, not loaded", line)
    if int(value.shape[0]) < MIN_ROWS:
        return Refusal(f"a matrix of {int(value.shape[0])} rows keeps float32 activations", line)
    return Match(x, weight, bias)


def _round_attention(graph: fx.Graph, context: PassContext) -> int:
    """Mark attention over bf16 and over int8 codes; return how many there are."""
    hits = 0
    for node in graph.find_nodes(op="call_function", target=aios.paged_attention.default):
        q, keys, values = (a.meta["val"] for a in node.args[:3] if isinstance(a, fx.Node))
        if q.dtype != torch.float32 or keys.dtype not in (torch.bfloat16, torch.int8):
            continue
        width, v_width = int(keys.shape[2]), int(values.shape[3])
        if not can_round(keys.dtype == torch.int8, width, v_width):
            reason = f"attention with heads of {width} and {v_width}: no whole vectors of products"
            context.refuse(Refusal(reason, provenance.place(node)))
            continue
        node.kwargs = {**node.kwargs, "rounded": True}
        hits += 1
    return hits


@graph_pass(numerics="lossy", target="cpp")
def round_activations(graph: fx.Graph, context: PassContext) -> int:
    """Replace a linear on a bf16 weight by one that rounds its activations to bf16; mark attention.

    Before::

        def f(x: "f32[T, 64]", w: "weight bf16[128, 64]"):
            return aios.linear.default(x, w, None)

    After::

        def f(x: "f32[T, 64]", w: "weight bf16[128, 64]"):
            return aios.bf16_linear.default(x, w, None)
    """
    if not context.options.bf16_dot:
        return 0
    hits = _round_attention(graph, context)
    for node in graph.find_nodes(op="call_function", target=aios.linear.default):
        match = _match(node, context)
        if match is None:
            continue
        if isinstance(match, Refusal):
            context.refuse(match)
            continue
        with graph.inserting_before(node):
            new = context.call(graph, aios.bf16_linear.default, *match, source=[node])
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        hits += 1
    return hits
