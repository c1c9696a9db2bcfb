"""Keep the weights of linears as 4- or 8-bit codes, with one scale for each group of a row.

Pays in bytes: a decode step at batch 1 reads every weight once and is bound by that (Qwen3-0.6B:
1,192 MB in bf16, 633 MB at 8.5 bits, 335 MB at 4.5). Products of int8 activations with codes are
also several times cheaper than float ones in prefill. The loader quantises (a weight recipe), layer
by layer, searching each group's scale for the least squared error; the report says what error each
matrix has. Embedding tables are gathered, a row a token: they cost memory and no time, and are
quantised by choice (quantize_embeddings); one that is tied to the head is then stored once. What
stays as it is, each with its reason: weights that lose more than a bit's worth against normal ones
(measured before the passes, ir/quantization_error.py), rows that are no multiple of 32 values
(others get the largest group, up to the one asked for, that cuts them: the report names it),
and matrices of a few rows (routers), whose bytes do not count. The matrices of experts are nearly
all weights of a mixture; they stay where the target has no kernel for them (Triton).

What is proven is the rewrite: the program after, on dequantised weights and exact activations,
against the program before on the same dequantised weights (passes/certificate.py). How large the
quantisation's own error is, the loader measures and the report says.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, fx

from aios_compile.ir import provenance
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fusion_groups import is_call
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.keep_quantized_weights import operands_of, read_rows

aten, aios = torch.ops.aten, torch.ops.aios
MIN_ROWS = 64
BLOCK = 16  # rows that are packed together: an expert's begin at one of theirs


class Match(NamedTuple):
    """form: with the largest group that cuts the weight's rows, up to that which was asked for."""

    node: fx.Node
    weight: fx.Node
    form: QuantFormat


def _match(node: fx.Node, form: QuantFormat, context: PassContext) -> Match | Refusal:
    line = provenance.place(node)
    x, weight, _ = operands_of(node)
    experts = node.target is aios.expert_linear.default
    if experts and context.options.target != "cpp":
        target = context.options.target
        return Refusal(f"matrices of experts, which no {target} kernel reads as codes", line)
    if not context.is_weight(weight):
        return Refusal("a weight is computed in the graph, not loaded", line)
    value = weight.meta["val"]
    if value.dim() != 2 + experts or not value.is_floating_point():
        return Refusal(f"a weight that is {value.dtype} of {value.dim()} dimensions", line)
    *counts, depth = map(int, value.shape)
    fitting = form.fitting(depth)
    if fitting is None:
        reason = f"rows of {depth} values, no multiple of the {form.span} of {form.name} nor of 32"
        return Refusal(reason, line)
    if depth % 32:
        return Refusal(f"rows of {depth} values, no multiple of 32 activations", line)
    if experts and (counts[1] % BLOCK or x.meta["val"].dtype != torch.float32):
        return Refusal(f"experts of {counts[1]} rows, no multiple of {BLOCK} in float32", line)
    if prod(counts) < MIN_ROWS:
        return Refusal(f"a matrix of {counts[0]} rows is too small to gain from quantisation", line)
    if node.target is aten.embedding.default and x.meta["val"].dim() != 1:
        return Refusal("ids that are no list", line)
    names = {name for recipe in context.recipes(weight) for name in recipe.names}
    for name, reason in context.options.kept_weights:
        if name in names:
            return Refusal(reason, line)
    return Match(node, weight, fitting)


@graph_pass(numerics="lossy")
def quantize_weights(graph: fx.Graph, context: PassContext) -> int:
    """Replace a linear by one on quantised rows, which the loader makes of the weight.

    With quantize_embeddings also a lookup in a table, which may be the head's weight as well; and a
    mixture's product with the matrices of its experts (expert_linear).

    Before::

        def f(x: "f32[T, 64]", w: "weight bf16[128, 64]"):
            return aios.linear.default(x, w, None)

    After::

        def f(x: "f32[T, 64]", w_int8_g32_f16: "weight u8[128, 68]"):
            return aios.quantized_linear.default(x, w_int8_g32_f16, "int8_g32_f16", None)
    """
    if not context.options.quantization:
        return 0
    form = QuantFormat.parse(context.options.quantization)
    made: dict[fx.Node, fx.Node] = {}
    hits = 0
    tables = [aten.embedding.default] * context.options.quantize_embeddings
    targets = (aios.linear.default, aios.expert_linear.default, *tables)
    for node in [n for n in graph.nodes if is_call(n, *targets)]:
        match = _match(node, form, context)
        if isinstance(match, Refusal):
            context.refuse(match)
            continue
        if match.weight not in made:
            made[match.weight] = _quantized(graph, match.weight, match.form, context)
        if node.target is aios.expert_linear.default:
            _read_experts(graph, node, made[match.weight], match.form.name, context)
        else:
            read_rows(graph, node, made[match.weight], match.form.name, context)
        hits += 1
    return hits


def _read_experts(
    graph: fx.Graph, node: fx.Node, rows: fx.Node, form: str, context: PassContext
) -> None:
    x, _, experts, *bias = node.args
    values = (x, rows, experts, form, *bias)
    with graph.inserting_before(node):
        new = context.call(graph, aios.quantized_expert_linear.default, *values, source=[node])
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _quantized(
    graph: fx.Graph, weight: fx.Node, form: QuantFormat, context: PassContext
) -> fx.Node:
    def build(w: Tensor) -> Tensor:
        rows: Tensor = aios.quantize_rows.default(w, form.name)
        return rows

    return context.add_weight(graph, f"{weight.name}_{form.name}", [weight], build)
