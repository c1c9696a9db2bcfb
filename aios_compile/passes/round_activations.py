"""Multiply bf16 weights by activations rounded to bf16, where the processor has such products.

Pays in arithmetic: AVX512-BF16 multiplies two pairs of bf16 a lane where a fused multiply-add
takes one float, so prefill of bf16 weights has twice the peak, and decode widens nothing. Weights
stay as they are; sums stay float32. An activation loses what transformers' own bf16 loses, but only
here, not after every operation; tests/compiled/test_bf16.py holds the error of whole models against
theirs. Matrices of a few rows (a mixture's router) keep float32 activations: rounding them saves
nothing and could choose another expert.

What is proven is the rewrite, with exact activations (ir/evaluate.py). To keep float32 activations:
AIOS_DISABLE=round_activations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
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


@graph_pass(numerics="lossy", target="cpp")
def round_activations(graph: fx.Graph, context: PassContext) -> int:
    """Replace a linear on a bf16 weight by one that rounds its activations to bf16.

    Before::

        def f(x: "f32[T, 64]", w: "weight bf16[128, 64]"):
            return aios.linear.default(x, w, None)

    After::

        def f(x: "f32[T, 64]", w: "weight bf16[128, 64]"):
            return aios.bf16_linear.default(x, w, None)
    """
    if not context.options.bf16_dot:
        return 0
    hits = 0
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
