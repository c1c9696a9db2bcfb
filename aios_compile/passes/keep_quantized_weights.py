"""Compute with the codes of a checkpoint that is quantised already, instead of floats made of them.

Pays in bytes, as quantize_weights does, and loses nothing to a second quantisation: GGUF, GPTQ, AWQ
and compressed-tensors files keep their own codes and scales, to the bit. What the recipes before
this pass say is dequantize_rows(rows); afterwards linears and embeddings read the rows, and a table
that is tied to the head is one copy. Before the merges, so that matrices stored in different
formats (Q4_K beside Q6_K) stay apart; those of one format are merged as rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.module import Recipe
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.stored_weights import DEQUANTIZE, stored_rows
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fusion_groups import is_call
from aios_compile.passes.graph_pass import graph_pass

aten, aios = torch.ops.aten, torch.ops.aios
TARGETS = (aios.linear.default, aten.embedding.default)
ACTIVATION_GROUP = 32


class Match(NamedTuple):
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    form: str
    names: list[str]  # of the rows, one a call of the region
    orders: tuple[str, ...] = ()  # of the columns, one a call; () where they are in order
    rows: fx.Node | None = None  # where the graph has them already


def _match(node: fx.Node, context: PassContext) -> Match | Refusal | None:
    x, weight, bias = operands_of(node)
    if weight.target is DEQUANTIZE and context.is_weight(weight.args[0]):
        rows, form = weight.args
        assert isinstance(rows, fx.Node)
        return Match(node, x, weight, bias, str(form), [], rows=rows)
    if not context.is_weight(weight):
        return None
    stored = [stored_rows(recipe) for recipe in context.recipes(weight)]
    found = [entry for entry in stored if entry is not None]
    if not found:
        return None
    line = provenance.place(node)
    forms = sorted({entry.form for entry in found})
    if len(found) < len(stored) or len(forms) > 1:
        return Refusal(f"stored as {' and '.join(forms)} in some layers only", line)
    depth = int(weight.meta["val"].shape[1])
    if depth % ACTIVATION_GROUP:
        return Refusal(f"rows of {depth} values, no multiple of {ACTIVATION_GROUP}", line)
    if x.meta["val"].dim() != 1 and node.target is aten.embedding.default:
        return Refusal("ids that are no list", line)
    orders = tuple(entry.order for entry in found if entry.order)
    if 0 < len(orders) < len(found):
        return Refusal("columns shuffled among the groups in some layers only", line)
    if orders and node.target is aten.embedding.default:
        return Refusal("a table whose columns are shuffled among the groups", line)
    return Match(node, x, weight, bias, forms[0], [entry.name for entry in found], orders)


def operands_of(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Return the input (or ids), the weight (or table) and the bias."""
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if node.target is aten.embedding.default:  # table, ids, padding and training options
        x, weight, bias = weight, x, None
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    assert bias is None or isinstance(bias, fx.Node)
    return x, weight, bias


@graph_pass(numerics="lossy")
def keep_quantized_weights(graph: fx.Graph, context: PassContext) -> int:
    """Replace linears and embeddings whose weight is dequantised from stored rows by ones on rows.

    Where a checkpoint stores `w` quantised, its recipe is dequantize_rows of the stored rows; the
    example has it in the graph. Rows whose columns were sorted by group (act-order) come with the
    order of the columns, in which the linear then reads x.

    Before::

        def f(x: "f32[T, 64]", rows: "weight u8[128, 68]"):
            w = aios.dequantize_rows.default(rows, "int8_g32_f16")
            return aios.linear.default(x, w, None)

    After::

        def f(x: "f32[T, 64]", rows: "weight u8[128, 68]"):
            return aios.quantized_linear.default(x, rows, "int8_g32_f16", None)
    """
    made: dict[fx.Node, fx.Node] = {}
    orders: dict[tuple[str, ...], fx.Node] = {}  # those that are equal in all layers are one
    hits = 0
    for node in [n for n in graph.nodes if is_call(n, *TARGETS)]:
        match = _match(node, context)
        if isinstance(match, Refusal):
            context.refuse(match)
        elif match is not None:
            if match.weight not in made:
                made[match.weight] = match.rows or _rows(graph, match, context)
            if match.orders and match.orders not in orders:
                orders[match.orders] = _order(graph, match, context)
            order = orders.get(match.orders)
            read_rows(graph, node, made[match.weight], match.form, context, order)
            hits += 1
    return hits


def read_rows(
    graph: fx.Graph,
    node: fx.Node,
    rows: fx.Node,
    form: str,
    context: PassContext,
    order: fx.Node | None = None,
) -> None:
    """Replace a linear or an embedding by one that reads quantised rows.

    order: the column of each value of a row, of a linear whose columns were sorted by group.
    """
    x, _, bias = operands_of(node)
    with graph.inserting_before(node):
        if node.target is aten.embedding.default:
            values: tuple[Any, ...] = (rows, x, form)
            new = context.call(graph, aios.quantized_embedding.default, *values, source=[node])
        else:
            values = (x, rows, form, bias) if order is None else (x, rows, form, bias, order)
            new = context.call(graph, aios.quantized_linear.default, *values, source=[node])
    if new.meta["val"].dtype != node.meta["val"].dtype:
        new = _narrowed(graph, node, new, context)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _narrowed(graph: fx.Graph, node: fx.Node, new: fx.Node, context: PassContext) -> fx.Node:
    """Return `new` in the dtype of the node; who widens that again gets `new` as it is."""
    for user in list(node.users):
        cast = is_call(user, aten._to_copy.default)
        if cast and user.meta["val"].dtype == new.meta["val"].dtype:
            user.replace_all_uses_with(new)
            graph.erase_node(user)
    if not node.users:
        return new
    with graph.inserting_before(node):
        dtype = node.meta["val"].dtype
        return context.call(graph, aten._to_copy.default, new, dtype=dtype, source=[node])


def _rows(graph: fx.Graph, match: Match, context: PassContext) -> fx.Node:
    rows, depth = map(int, match.weight.meta["val"].shape)
    shape = (rows, QuantFormat.parse(match.form).row_bytes(depth))
    with context.module.mode:
        value = torch.empty(shape, dtype=torch.uint8)
    recipes = [Recipe.identity(name) for name in match.names]
    return context.add_recipes(graph, f"{match.weight.name}_{match.form}", value, recipes)


def _order(graph: fx.Graph, match: Match, context: PassContext) -> fx.Node:
    with context.module.mode:
        value = torch.empty(int(match.weight.meta["val"].shape[1]), dtype=torch.int32)
    recipes = [Recipe.identity(name) for name in match.orders]
    return context.add_recipes(graph, f"{match.weight.name}_order", value, recipes)
