"""Mistakes in weights that the checkpoint stores as codes, and in those of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.passes.context import PassContext
from tests.planted.plants import calls, plant, rebuild, set_argument

aten = torch.ops.aten
aios = torch.ops.aios


@plant("keep_quantized_weights", "stored")
def one_matrix_for_two(graph: fx.Graph, context: PassContext) -> int:
    """Share what was made for the first weight with the second."""
    a, b = calls(graph, aios.quantized_linear.default)
    return set_argument([b], 1, lambda _: a.args[1])


@plant("keep_quantized_weights", "stored")
def stored_rows_of_the_neighbour(graph: fx.Graph, context: PassContext) -> int:
    a, b = calls(graph, aios.quantized_linear.default)
    rows = a.args[1], b.args[1]
    return set_argument([a], 1, lambda _: rows[1]) + set_argument([b], 1, lambda _: rows[0])


@plant("keep_quantized_weights", "stored")
def another_row_of_the_input(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aios.quantized_linear.default)[0]
    x: Any = node.args[0]
    with graph.inserting_before(node):
        new = context.call(graph, aten.flip.default, x, [1], source=[node])
    return set_argument([node], 0, lambda _: new)


@plant("keep_quantized_weights", "ordered")
def activations_in_their_own_order(graph: fx.Graph, context: PassContext) -> int:
    nodes = calls(graph, aios.quantized_linear.default)
    return set_argument(nodes, 4, lambda _: None)


@plant("keep_quantized_weights", "ordered")
def order_of_the_first_for_all(graph: fx.Graph, context: PassContext) -> int:
    a, b = calls(graph, aios.quantized_linear.default)
    return set_argument([b], 4, lambda _: a.args[4])


@plant("keep_quantized_weights", "ordered")
def places_instead_of_columns(graph: fx.Graph, context: PassContext) -> int:
    """The order's inverse, which is as good an order."""
    return rebuild(context, "_order", lambda order: torch.argsort(order).to(torch.int32))


@plant("quantize_weights", "mixture")
def codes_of_the_next_expert(graph: fx.Graph, context: PassContext) -> int:
    return rebuild(context, "_int8_g32_f16", lambda rows: torch.roll(rows, 1, 0))


@plant("quantize_weights", "mixture")
def first_expert_for_all(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aios.quantized_expert_linear.default)[1]
    chosen: Any = node.args[2]
    with graph.inserting_before(node):
        new = context.call(graph, aten.mul.Tensor, chosen, 0, source=[node])
    return set_argument([node], 2, lambda _: new)
