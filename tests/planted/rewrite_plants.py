"""Mistakes of the passes that page, gather, sample and merge."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import Recipe
from aios_compile.passes.context import PassContext
from tests.planted.plants import (
    behind,
    calls,
    input_named,
    plant,
    rebuild,
    set_argument,
    swap,
)

aten, aios = torch.ops.aten, torch.ops.aios
WRITE, PAGED = aios.kv_write.default, aios.paged_attention.default
QUANTIZED_WRITE = aios.quantized_kv_write.default


def _shifted(graph: fx.Graph, node: fx.Node, context: PassContext, by: int) -> fx.Node:
    with graph.inserting_after(node):
        return context.call(graph, aten.add.Tensor, node, by, source=list(node.users))


def _shift_input(graph: fx.Graph, name: str, context: PassContext, by: int) -> int:
    node = input_named(graph, name)
    new = _shifted(graph, node, context, by)
    node.replace_all_uses_with(new, lambda user: user is not new)
    return 1


@plant("page_attention", "qwen3")
def wrong_slot(graph: fx.Graph, context: PassContext) -> int:
    return _shift_input(graph, "slots", context, 1)


@plant("page_attention", "qwen3")
def keys_and_values_swapped(graph: fx.Graph, context: PassContext) -> int:
    return swap(calls(graph, WRITE)[0], 0, 1)


@plant("page_attention", "qwen3")
def last_key_not_read(graph: fx.Graph, context: PassContext) -> int:
    """Read a context that is one token too short, but for the first token."""
    node = input_named(graph, "context_lengths")
    new = _shifted(graph, node, context, -1)
    with graph.inserting_after(new):
        one = context.call(graph, aten.clamp.default, new, 1, source=list(node.users))
    node.replace_all_uses_with(one, lambda user: user is not new)
    return 1


@plant("page_attention", "qwen3")
def pages_in_another_order(graph: fx.Graph, context: PassContext) -> int:
    if not context.region:
        return 0
    node = input_named(graph, "page_tables")
    return behind(graph, context, node, aten.flip.default, [1])


@plant("page_attention", "qwen3")
def scale_of_the_paged_attention(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, PAGED), 6, lambda scale: scale * 1.01)


@plant("page_attention", "window")
def paged_window_off_by_one(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, PAGED), 7, lambda window: window - 1)


@plant("page_attention", "wide_window")
def wide_paged_window_off_by_one(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, PAGED), 7, lambda window: window - 1)


@plant("page_attention", "huge_window")
def huge_paged_window_off_by_one(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, PAGED), 7, lambda window: window + 1)


@plant("page_attention", "gemma2")
def paged_softcap_forgotten(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, PAGED), 8, lambda softcap: None)


@plant("page_attention", "qwen3")
def reads_the_old_cache(graph: fx.Graph, context: PassContext) -> int:
    """Attend over the cache as it was before this step's keys were written."""
    write = calls(graph, WRITE)[0]
    node = calls(graph, PAGED)[0]
    old_k, old_v = write.args[2], write.args[3]
    node.args = (node.args[0], old_k, old_v, *node.args[3:])
    return 1


def _change_scales(graph: fx.Graph, change: Callable[[Any, Any], tuple[Any, Any]]) -> int:
    node = calls(graph, PAGED)[0]
    k, v = change(node.kwargs["k_scales"], node.kwargs["v_scales"])
    node.kwargs = {**node.kwargs, "k_scales": k, "v_scales": v}
    return 1


@plant("quantize_kv", "int8_kv")
def scales_swapped_where_they_are_read(graph: fx.Graph, context: PassContext) -> int:
    return _change_scales(graph, lambda k, v: (v, k))


@plant("quantize_kv", "int8_kv")
def scales_not_read(graph: fx.Graph, context: PassContext) -> int:
    return _change_scales(graph, lambda k, v: (None, None))


@plant("quantize_kv", "int8_kv")
def scales_of_the_step_before(graph: fx.Graph, context: PassContext) -> int:
    write = calls(graph, QUANTIZED_WRITE)[0]
    return _change_scales(graph, lambda k, v: (write.args[4], v))


@plant("quantize_kv", "int8_kv")
def quantised_keys_and_values_swapped(graph: fx.Graph, context: PassContext) -> int:
    return swap(calls(graph, QUANTIZED_WRITE)[0], 0, 1)


@plant("quantize_kv", "int8_kv")
def quantised_slot_shifted(graph: fx.Graph, context: PassContext) -> int:
    return _shift_input(graph, "slots", context, 1)


@plant("quantize_kv", "int8_kv")
def window_lost_with_the_scales(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, PAGED), 7, lambda window: None)


@plant("quantize_kv", "e4m3_kv")
def scales_of_int8_for_e4m3_codes(graph: fx.Graph, context: PassContext) -> int:
    """Scales as if the largest code were 127, not 448."""
    node = calls(graph, PAGED)[0]
    with graph.inserting_before(node):
        scales = node.kwargs["v_scales"]
        wrong = context.call(graph, aten.mul.Tensor, scales, 448 / 127, source=[node])
    return _change_scales(graph, lambda k, v: (k, wrong))


@plant("quantize_kv", "e4m3_kv")
@plant("quantize_kv", "int8_kv")
def keys_a_hundredth_too_large(graph: fx.Graph, context: PassContext) -> int:
    """Within what rounding to codes may change: only the exact comparison sees it."""
    node = calls(graph, QUANTIZED_WRITE)[0]
    with graph.inserting_before(node):
        larger = context.call(graph, aten.mul.Tensor, node.args[0], 1.01, source=[node])
    node.args = (larger, *node.args[1:])
    return 1


@plant("gather_last_tokens", "qwen3")
def wrong_gather_row(graph: fx.Graph, context: PassContext) -> int:
    node = input_named(graph, "logit_rows")
    with graph.inserting_after(node):
        new = context.call(graph, aten.sub.Tensor, node, 1, source=list(node.users))
    with graph.inserting_after(new):
        low = context.call(graph, aten.clamp.default, new, 0, source=list(node.users))
    node.replace_all_uses_with(low, lambda user: user is not new)
    return 1


@plant("gather_last_tokens", "qwen3")
def gather_rows_in_reverse(graph: fx.Graph, context: PassContext) -> int:
    node = input_named(graph, "logit_rows")
    return behind(graph, context, node, aten.flip.default, [0])


@plant("gather_last_tokens", "qwen3")
def norm_lost_behind_the_gather(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aios.rms_norm.default)[-1]
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    return 1


@plant("sample_tokens", "qwen3")
def greedy_and_random_swapped(graph: fx.Graph, context: PassContext) -> int:
    return swap(calls(graph, aios.sample.default)[0], 3, 4)


@plant("sample_tokens", "qwen3")
def logits_scaled_before_sampling(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aios.sample.default)[0]
    logits: Any = node.args[0]
    with graph.inserting_before(node):
        new = context.call(graph, aten.mul.Tensor, logits, 0.5, source=[node])
    return set_argument([node], 0, lambda _: new)


@plant("sample_tokens", "qwen3")
def results_in_another_order(graph: fx.Graph, context: PassContext) -> int:
    found: list[Any] = calls(graph, operator.getitem)
    items = [n for n in found if n.args[0].target is aios.sample.default]
    by_index = {n.args[1]: n for n in items}
    by_index[1].args, by_index[4].args = by_index[4].args, by_index[1].args
    return 2


@plant("sample_tokens", "qwen3")
def repetition_penalty_left_out(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aios.sample.default)[0]
    penalty: Any = node.args[7]
    with graph.inserting_before(node):
        new = context.call(graph, aten.ones_like.default, penalty, source=[node])
    return set_argument([node], 7, lambda _: new)


@plant("sample_tokens", "qwen3")
def presence_penalty_left_out(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aios.sample.default)[0]
    penalty: Any = node.args[8]
    with graph.inserting_before(node):
        new = context.call(graph, aten.zeros_like.default, penalty, source=[node])
    return set_argument([node], 8, lambda _: new)


@plant("sample_tokens", "qwen3")
def frequency_penalty_left_out(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aios.sample.default)[0]
    penalty: Any = node.args[9]
    with graph.inserting_before(node):
        new = context.call(graph, aten.zeros_like.default, penalty, source=[node])
    return set_argument([node], 9, lambda _: new)


@plant("merge_qkv", "qwen3")
def merged_in_another_order(graph: fx.Graph, context: PassContext) -> int:
    return rebuild(context, "qkv_proj_weight", lambda w: torch.roll(w, 16, 0))


@plant("merge_qkv", "qwen3")
def merged_transposed(graph: fx.Graph, context: PassContext) -> int:
    """Read the stacked matrix as if it were stored the other way round."""
    return rebuild(
        context, "qkv_proj_weight", lambda w: torch.reshape(torch.transpose(w, 0, 1), (64, 32))
    )


@plant("merge_qkv", "qwen3")
def keys_read_from_the_values(graph: fx.Graph, context: PassContext) -> int:
    a, b = calls(graph, aten.slice.Tensor)[-2:]
    a.args, b.args = b.args, a.args
    return 1


@plant("merge_qkv", "qwen2")
def biases_in_another_order(graph: fx.Graph, context: PassContext) -> int:
    return rebuild(context, "qkv_proj_bias", lambda b: torch.roll(b, 8, 0))


@plant("merge_qkv", "qwen3")
def one_layers_weight_for_all(graph: fx.Graph, context: PassContext) -> int:
    weights = context.module.weights
    names = [n for n in weights if n.endswith("qkv_proj_weight")]
    for name in names[1:]:
        weights[name] = weights[names[0]]
    return len(names[1:])


@plant("merge_gate_up", "qwen3")
def gate_and_up_stacked_the_other_way(graph: fx.Graph, context: PassContext) -> int:
    return rebuild(context, "gate_up_proj_weight", lambda w: torch.roll(w, 48, 0))


@plant("merge_gate_up", "qwen3")
def halves_cut_one_row_late(graph: fx.Graph, context: PassContext) -> int:
    return rebuild(context, "gate_up_proj_weight", lambda w: torch.roll(w, 1, 0))


@plant("merge_gate_up", "half")
def merged_weight_rounded(graph: fx.Graph, context: PassContext) -> int:
    """Store the merged weight in less precision than its parts."""
    return rebuild(context, "gate_up_proj_weight", lambda w: (w * 8).round() / 8)


def _quantised(context: PassContext) -> list[str]:
    return [n for n in context.module.weights if "int8" in n]


@plant("quantize_weights", "quantised")
def quantised_rows_in_another_order(graph: fx.Graph, context: PassContext) -> int:
    if context.region:
        return 0
    weights = context.module.weights
    for name in _quantised(context):
        weights[name] = Recipe.compose(lambda w: torch.roll(w, 1, 0), [weights[name]])
    return len(_quantised(context))


@plant("quantize_weights", "quantised")
def one_layers_rows_for_all(graph: fx.Graph, context: PassContext) -> int:
    weights = context.module.weights
    names = [n for n in _quantised(context) if "gate_up" in n]
    for name in names[1:]:
        weights[name] = weights[names[0]]
    return len(names[1:])


def _scale_inputs(graph: fx.Graph, context: PassContext, target: Any, factor: float) -> int:
    nodes = calls(graph, target)
    for node in nodes:
        x: Any = node.args[0]
        with graph.inserting_before(node):
            new = context.call(graph, aten.mul.Tensor, x, factor, source=[node])
        node.args = (new, *node.args[1:])
    return len(nodes)


@plant("quantize_weights", "quantised")
def unquantised_input_scaled(graph: fx.Graph, context: PassContext) -> int:
    return _scale_inputs(graph, context, aios.quantized_linear.default, 1.01)


@plant("round_activations", "rounded")
def rounded_input_scaled(graph: fx.Graph, context: PassContext) -> int:
    """Scale by less than the rounding: exact activations while proving leave no room for it."""
    return _scale_inputs(graph, context, aios.bf16_linear.default, 1.001)


@plant("round_activations", "rounded")
def rounded_product_with_rows_in_another_order(graph: fx.Graph, context: PassContext) -> int:
    found = calls(graph, aios.bf16_linear.default)[:1]
    for node in found:
        with graph.inserting_after(node):
            new = context.call(graph, aten.flip.default, node, [1], source=[node])
        node.replace_all_uses_with(new, lambda user, new=new: user is not new)
    return len(found)


@plant("round_activations", "rounded")
def rounded_before_the_norm(graph: fx.Graph, context: PassContext) -> int:
    """Move the rounding up: round what the norm reads, and leave the norm out."""
    found = calls(graph, aios.bf16_linear.default)
    normed = [n for n in found if getattr(n.args[0], "target", None) is aios.rms_norm.default]
    return set_argument(normed[:1], 0, lambda norm: norm.args[0])


@plant("round_activations", "rounded")
def rounded_query_scaled(graph: fx.Graph, context: PassContext) -> int:
    """Likewise of what attention rounds."""
    return _scale_inputs(graph, context, PAGED, 1.001)
