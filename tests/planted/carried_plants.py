"""Mistakes that no value of a sample reaches, and those that are not in the graph: bounds far away,
rows of a vocabulary, lists of the sampler, what a program is bound to."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import LengthLimit, body_of, is_kernel_call
from aios_compile.passes.context import PassContext
from tests.planted.plants import behind, calls, input_named, plant, rebuild, set_argument

aten, aios = torch.ops.aten, torch.ops.aios


def _in_front(user: fx.Node, index: int, context: PassContext, target: Any, *more: Any) -> int:
    with user.graph.inserting_before(user):
        new = context.call(user.graph, target, user.args[index], *more, source=[user])
    return set_argument([user], index, lambda _: new)


def _bound_to(graph: fx.Graph, context: PassContext, name: str) -> fx.Node:
    return next(n for n in graph.nodes if context.module.inputs.get(n.name) == name)


def _exchange(graph: fx.Graph, number: int, other: int) -> int:
    found = [n for n in graph.nodes if n.op == "call_function" and number in n.args]
    for node in found:
        node.args = tuple(other if a == number else a for a in node.args)
    return len(found)


@plant("fold_constants", "far")
def far_length_exchanged(graph: fx.Graph, context: PassContext) -> int:
    return _exchange(graph, 4096, 8192)


@plant("fuse_pointwise", "far")
def far_length_exchanged_in_the_kernel(graph: fx.Graph, context: PassContext) -> int:
    bodies = [body_of(n).graph for n in graph.nodes if is_kernel_call(n)]
    return sum(_exchange(body, 4096, 5000) for body in bodies)


@plant("raise_rope", "far")
def rotation_ends_at_4096(graph: fx.Graph, context: PassContext) -> int:
    positions = _bound_to(graph, context, "positions")
    return behind(graph, context, positions, aten.clamp.default, None, 4095)


@plant("page_attention", "qwen3")
@plant("merge_qkv", "qwen3")
def context_ends_at_128(graph: fx.Graph, context: PassContext) -> int:
    lengths = input_named(graph, "context_lengths")
    return behind(graph, context, lengths, aten.clamp.default, None, 128)


@plant("raise_gated_mlp", "qwen3")
def large_gates_cut(graph: fx.Graph, context: PassContext) -> int:
    gated = calls(graph, aios.gated_activation.default)[0]
    return _in_front(gated, 0, context, aten.clamp.default, None, 7.0)


@plant("raise_linear", "vocabulary")
def ids_end_at_100(graph: fx.Graph, context: PassContext) -> int:
    ids = _bound_to(graph, context, "token_ids")
    return behind(graph, context, ids, aten.clamp.default, None, 100)


@plant("raise_linear", "vocabulary")
def rows_behind_100_are_lost(graph: fx.Graph, context: PassContext) -> int:
    def first_rows(w: Any) -> Any:
        return w * torch.le(torch.cumsum(torch.ones_like(w), 0), 100)

    return rebuild(context, "lm_head_weight", first_rows)


@plant("sample_tokens", "qwen3")
def counts_of_the_penalties_ignored(graph: fx.Graph, context: PassContext) -> int:
    return _in_front(calls(graph, aios.sample.default)[0], 12, context, aten.ones_like.default)


@plant("sample_tokens", "qwen3")
def lists_of_allowed_ids_ignored(graph: fx.Graph, context: PassContext) -> int:
    return _in_front(calls(graph, aios.sample.default)[0], 16, context, aten.zeros_like.default)


@plant("sample_tokens", "qwen3")
def neighbours_of_the_allowed_ids(graph: fx.Graph, context: PassContext) -> int:
    return _in_front(calls(graph, aios.sample.default)[0], 17, context, aten.add.Tensor, 1)


@plant("sample_tokens", "qwen3")
def many_candidates_cut(graph: fx.Graph, context: PassContext) -> int:
    sample = calls(graph, aios.sample.default)[0]
    return _in_front(sample, 2, context, aten.clamp.default, None, 20)


@plant("round_activations", "not_rounded")
def activations_of_float_weights_rounded(graph: fx.Graph, context: PassContext) -> int:
    found = calls(graph, aios.linear.default)
    for node in found:
        node.target = aios.bf16_linear.default
    return len(found)


@plant("fold_constants", "qwen3")
def limit_of_the_model_replaced(graph: fx.Graph, context: PassContext) -> int:
    context.module.length_limit = LengthLimit(7, "nowhere")
    return 1
