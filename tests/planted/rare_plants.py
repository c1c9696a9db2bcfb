"""Mistakes that few samples show: in inner layers, far into a prompt, between sequences, below the
roundings, in the second result."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import Recipe
from aios_compile.passes.context import PassContext
from tests.planted.plants import behind, calls, input_named, plant, set_argument

aten, aios = torch.ops.aten, torch.ops.aios
RMS = aios.rms_norm.default


@plant("eliminate_common_subexpressions", "layers")
def inner_layers_exchange_a_weight(graph: fx.Graph, context: PassContext) -> int:
    """Of six layers spoil the second and the third, of which no sample runs one by its turn."""
    if context.region:
        return 0
    _, a, b, *_ = context.module.calls("layer")
    weights = context.module.weights
    values: list[Any] = list(a.args)
    at = next(i for i, n in enumerate(values) if n.name in weights and n.meta["val"].dim() == 2)
    of_a, of_b = a.args[at], b.args[at]
    return set_argument([a], at, lambda _: of_b) + set_argument([b], at, lambda _: of_a)


@plant("raise_linear", "two_results")
def a_result_lost(graph: fx.Graph, context: PassContext) -> int:
    context.module.outputs = ("first",)
    (values,) = graph.output_node().args
    graph.output_node().args = (values[:1],)  # type: ignore[index]
    return 1


@plant("raise_linear", "two_results")
def second_result_a_thousandth_too_large(graph: fx.Graph, context: PassContext) -> int:
    (values,) = graph.output_node().args
    first, second = values  # type: ignore[misc, union-attr]
    with graph.inserting_before(graph.output_node()):
        new = context.call(graph, aten.mul.Tensor, second, 1.001, source=[second])
    graph.output_node().args = ((first, new),)
    return 1


@plant("raise_rms_norm", "wide")
def wrong_epsilon_of_one_norm(graph: fx.Graph, context: PassContext) -> int:
    """Of the queries alone, where a square is 1e6 times as large."""
    found = [n for n in calls(graph, RMS) if n.meta["val"].dim() == 3]
    return set_argument(found[:1], 2, lambda eps: eps * 2)


@plant("raise_attention", "qwen3")
def window_that_nobody_asked_for(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.attention.default), 4, lambda window: 4096)


@plant("raise_attention", "huge_window")
def huge_window_off_by_one(graph: fx.Graph, context: PassContext) -> int:
    """While the mask is still spelled out before the pass."""
    return set_argument(calls(graph, aios.attention.default), 4, lambda window: window - 1)


@plant("raise_rope", "qwen3")
def rotation_ends_at_64(graph: fx.Graph, context: PassContext) -> int:
    """Look tables of 64 positions up, as if no prompt were longer."""
    names = context.module.inputs
    node = next(n for n in graph.nodes if names.get(n.name) == "positions")
    return behind(graph, context, node, aten.clamp.default, None, 63)


@plant("page_attention", "qwen3")
def pages_of_the_first_sequence(graph: fx.Graph, context: PassContext) -> int:
    """Let every sequence of a batch read the first one's pages."""
    if not context.region:
        return 0
    node = input_named(graph, "page_tables")
    made = list[fx.Node]()
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        source = list(node.users)
        first = context.call(graph, aten.slice.Tensor, node, 0, 0, 1, source=source)
        zeros = context.call(graph, aten.zeros_like.default, node, source=source)
        made = [first, zeros, context.call(graph, aten.add.Tensor, zeros, first, source=source)]
    node.replace_all_uses_with(made[-1], lambda user: user not in made)
    return 1


@plant("page_attention", "qwen3")
def context_ends_at_64(graph: fx.Graph, context: PassContext) -> int:
    node = input_named(graph, "context_lengths")
    return behind(graph, context, node, aten.clamp.default, None, 64)


@plant("page_attention", "layers")
def a_layer_is_passed_by(graph: fx.Graph, context: PassContext) -> int:
    """Let the fourth layer read what the second returns; the third still writes its cache."""
    if context.region:
        return 0
    _, a, b, reader, *_ = context.module.calls("layer")
    hidden = [next(u for u in call.users if u.args[1] == 0) for call in (a, b)]
    return len([reader.replace_input_with(hidden[1], hidden[0])])


@plant("merge_qkv", "layers")
def bias_dropped_in_the_fifth_layer(graph: fx.Graph, context: PassContext) -> int:
    weights = context.module.weights
    names = [n for n in weights if n.endswith("qkv_proj_bias")]
    for name in names[4:5]:
        weights[name] = Recipe.compose(torch.zeros_like, [weights[name]])
    return len(names[4:5])
