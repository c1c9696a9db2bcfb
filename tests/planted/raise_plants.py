"""Mistakes of the passes that recognise what the mathematics means."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from aios_compile.passes.context import PassContext
from tests.planted.plants import behind, calls, drop, plant, rebuild, set_argument, swap

aten, aios = torch.ops.aten, torch.ops.aios
RMS, ROPE = aios.rms_norm.default, aios.rope.default


@plant("widen_activations", "half")
def epsilon_doubled(graph: fx.Graph, context: PassContext) -> int:
    found = [n for n in calls(graph, aten.add.Tensor) if isinstance(n.args[1], float)]
    return set_argument(found, 1, lambda eps: eps * 2)


@plant("widen_activations", "half")
def a_cast_that_rounds_is_left(graph: fx.Graph, context: PassContext) -> int:
    """Round the result of a product to half precision, as the model did."""
    node = calls(graph, aten.mm.default)[-1]
    source = [node]
    with graph.inserting_after(node):
        low = context.call(graph, aten._to_copy.default, node, dtype=torch.bfloat16, source=source)
    with graph.inserting_after(low):
        wide = context.call(graph, aten._to_copy.default, low, dtype=torch.float32, source=source)
    node.replace_all_uses_with(wide, lambda user: user is not low)
    return 1


@plant("widen_activations", "half")
def a_cast_moved_behind_a_product(graph: fx.Graph, context: PassContext) -> int:
    """Multiply in half precision and widen the result, not the operands."""
    node = calls(graph, aten.mm.default)[-1]

    def cast(value: Any, dtype: torch.dtype) -> fx.Node:
        return context.call(graph, aten._to_copy.default, value, dtype=dtype, source=[node])

    with graph.inserting_before(node):
        low = [cast(operand, torch.bfloat16) for operand in node.args]
        product = context.call(graph, aten.mm.default, *low, source=[node])
        return drop(node, cast(product, torch.float32))


@plant("fold_constants", "qwen3")
def attention_scale_forgotten(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.sdpa.default), 5, lambda scale: 1.0)


@plant("fold_constants", "gemma2")
def one_is_not_added_to_the_norm(graph: fx.Graph, context: PassContext) -> int:
    return rebuild(context, "_folded", lambda w: w - 1.0)


@plant("fold_constants", "dynamic")
def a_literal_of_the_wrong_sign(graph: fx.Graph, context: PassContext) -> int:
    found = [n for n in calls(graph, aten.mul.Tensor) if isinstance(n.args[1], float)]
    return set_argument(found[:1], 1, operator.neg)


@plant("eliminate_common_subexpressions", "qwen3")
def sine_taken_for_cosine(graph: fx.Graph, context: PassContext) -> int:
    cos, sin = calls(graph, aten.cos.default), calls(graph, aten.sin.default)
    return drop(sin[0], cos[0]) if cos and sin else 0


@plant("eliminate_common_subexpressions", "qwen3")
def difference_taken_as_commutative(graph: fx.Graph, context: PassContext) -> int:
    found = calls(graph, aten.mm.default)
    same = [n for n in found[1:] if n.meta["val"].shape == found[0].meta["val"].shape]
    return drop(same[0], found[0]) if same else 0


@plant("eliminate_common_subexpressions", "qwen3")
def weights_of_two_layers_taken_for_one(graph: fx.Graph, context: PassContext) -> int:
    """Merge inputs of the region that are equal in the first call only."""
    if context.region:
        return 0
    first, second = context.module.calls("layer")
    args = [*second.args[:1], first.args[1], *second.args[2:]]
    second.args = tuple(args)
    return 1


@plant("raise_linear", "qwen2")
def bias_dropped(graph: fx.Graph, context: PassContext) -> int:
    found = [n for n in calls(graph, aios.linear.default) if len(n.args) > 2]
    return set_argument(found[:1], 2, lambda bias: None) if found else 0


@plant("raise_linear", "qwen3")
def weight_of_the_neighbour(graph: fx.Graph, context: PassContext) -> int:
    """Bind keys and values the wrong way round."""
    found = calls(graph, aios.linear.default)
    shapes = [n.args[1].meta["val"].shape for n in found]  # type: ignore[union-attr]
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
    for a, b in pairs:
        if shapes[found.index(a)] == shapes[found.index(b)]:
            a.args, b.args = (a.args[0], b.args[1]), (b.args[0], a.args[1])
            return 1
    return 0


@plant("raise_linear", "qwen3")
def square_weight_transposed(graph: fx.Graph, context: PassContext) -> int:
    for node in calls(graph, aios.linear.default):
        weight: Any = node.args[1]
        rows, columns = weight.meta["val"].shape
        if rows == columns:
            new = context.add_weight(
                graph, "turned", [weight], lambda w: aten.permute.default(w, [1, 0]).contiguous()
            )
            node.args = (node.args[0], new, *node.args[2:])
            return 1
    return 0


@plant("raise_rms_norm", "qwen3")
def wrong_epsilon(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, RMS)[:1], 2, lambda eps: eps * 10)


@plant("raise_rms_norm", "half")
def wrong_epsilon_in_half_precision(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, RMS)[:1], 2, lambda eps: eps * 10)


@plant("raise_rms_norm", "qwen3")
def weight_of_the_norm_dropped(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, RMS)[-1:], 1, lambda weight: None)


@plant("raise_rms_norm", "qwen3")
def weights_of_two_norms_swapped(graph: fx.Graph, context: PassContext) -> int:
    norms = calls(graph, RMS)
    if len(norms) < 4:
        return 0
    a, b = norms[0], norms[3]  # input_layernorm and post_attention_layernorm
    wa, wb = a.args[1], b.args[1]
    return set_argument([a], 1, lambda _: wb) + set_argument([b], 1, lambda _: wa)


@plant("raise_rms_norm", "qwen3")
def another_input_normalised(graph: fx.Graph, context: PassContext) -> int:
    norms: list[Any] = calls(graph, RMS)
    sums = [n for n in norms if n.args[0].target is aten.add.Tensor]
    return set_argument(sums, 0, lambda total: total.args[0])


@plant("raise_layer_norm", "layer_norm")
def wrong_epsilon_of_the_layer_norm(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.layer_norm.default)[:1], 3, lambda eps: eps * 10)


@plant("raise_layer_norm", "layer_norm")
def bias_of_the_layer_norm_dropped(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.layer_norm.default)[:1], 2, lambda bias: None)


@plant("raise_layer_norm", "layer_norm")
def mean_not_subtracted(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aios.layer_norm.default)[0]
    x, weight, _, eps = node.args
    with graph.inserting_before(node):
        new = context.call(graph, RMS, x, weight, eps, True, source=[node])
    return drop(node, new)


@plant("raise_rope", "qwen3")
def halves_swapped(graph: fx.Graph, context: PassContext) -> int:
    """Rotate neighbours instead of halves."""
    return set_argument(calls(graph, ROPE)[:1], 3, lambda interleaved: not interleaved)


@plant("raise_rope", "qwen3")
def turned_backwards(graph: fx.Graph, context: PassContext) -> int:
    found = calls(graph, ROPE)
    for node in found:
        sine: Any = node.args[2]
        with graph.inserting_before(node):
            new = context.call(graph, aten.neg.default, sine, source=[node])
        set_argument([node], 2, lambda _, new=new: new)
    return len(found[:1])


@plant("raise_rope", "qwen3")
def keys_not_rotated(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, ROPE)[-1]
    return drop(node, node.args[0])


@plant("raise_rope", "qwen3")
def tables_swapped(graph: fx.Graph, context: PassContext) -> int:
    return swap(calls(graph, ROPE)[0], 1, 2)


@plant("raise_attention", "qwen3")
def scale_missing(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.attention.default), 3, lambda scale: 1.0)


@plant("raise_attention", "qwen3")
def keys_for_values(graph: fx.Graph, context: PassContext) -> int:
    return swap(calls(graph, aios.attention.default)[0], 1, 2)


@plant("raise_attention", "window")
def window_forgotten(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.attention.default), 4, lambda window: None)


@plant("raise_attention", "window")
def window_off_by_one(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.attention.default), 4, lambda window: window - 1)


@plant("raise_attention", "wide_window")
def wide_window_off_by_one(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.attention.default), 4, lambda window: window + 1)


@plant("raise_attention", "gemma2")
def softcap_forgotten(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.attention.default), 5, lambda softcap: None)


@plant("raise_attention", "qwen3")
def heads_grouped_by_turns(graph: fx.Graph, context: PassContext) -> int:
    """Let query head h read key head h % G instead of h // (H / G)."""
    node = calls(graph, aios.attention.default)[0]
    q: Any = node.args[0]
    with graph.inserting_before(node):
        new = context.call(graph, aten.flip.default, q, [1], source=[node])
    return set_argument([node], 0, lambda _: new)


@plant("raise_gated_mlp", "qwen3")
def gate_and_up_swapped(graph: fx.Graph, context: PassContext) -> int:
    return swap(calls(graph, aios.gated_activation.default)[0], 0, 1)


@plant("raise_gated_mlp", "qwen3")
def another_activation(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.gated_activation.default), 2, lambda name: "gelu")


@plant("raise_gated_mlp", "gemma2")
def exact_gelu_for_tanh(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(calls(graph, aios.gated_activation.default), 2, lambda name: "gelu")


@plant("raise_sequence_lengths", "dynamic")
def length_off_by_one(graph: fx.Graph, context: PassContext) -> int:
    node = next(n for n in graph.nodes if n.name == "sequence_lengths")
    return behind(graph, context, node, aten.sub.Tensor, 1)


@plant("raise_sequence_lengths", "dynamic")
def position_for_length(graph: fx.Graph, context: PassContext) -> int:
    node = next(n for n in graph.nodes if n.name == "sequence_lengths")
    names = context.module.inputs
    positions = next(n for n in graph.nodes if names.get(n.name) == "positions")
    node.replace_all_uses_with(positions)
    return 1


@plant("raise_sequence_lengths", "dynamic")
def length_for_position(graph: fx.Graph, context: PassContext) -> int:
    """Replace the positions as well: every token is rotated as far as the last one."""
    names = context.module.inputs
    positions = next(n for n in graph.nodes if names.get(n.name) == "positions")
    length = next(n for n in graph.nodes if n.name == "sequence_lengths")
    return len(positions.replace_all_uses_with(length))


@plant("raise_positions", "counted")
def row_after_the_position(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aten.index_select.default)[0]
    positions: Any = node.args[2]
    with graph.inserting_before(node):
        new = context.call(graph, aten.add.Tensor, positions, 1, source=[node])
    return set_argument([node], 2, lambda _: new)


@plant("raise_positions", "counted")
def row_of_the_token_before_the_last(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aten.index_select.default)[0]
    positions: Any = node.args[2]
    with graph.inserting_before(node):
        new = context.call(graph, aten.flip.default, positions, [0], source=[node])
    return set_argument([node], 2, lambda _: new)


@plant("raise_positions", "counted")
def counted_from_zero(graph: fx.Graph, context: PassContext) -> int:
    """Forget that arange(1, T + 1) begins at one."""
    node = next(n for n in calls(graph, aten.add.Tensor) if n.args[1] == 1)
    return len(node.replace_all_uses_with(node.args[0]))


@plant("eliminate_views", "layer_norm")
def pieces_of_a_split_swapped(graph: fx.Graph, context: PassContext) -> int:
    """Take queries for keys after a split has moved above a transpose."""
    split = calls(graph, aten.split_with_sizes.default)[0]
    a, b, _ = split.users
    a.args, b.args = b.args, a.args
    return 1


@plant("eliminate_views", "qwen3")
def heads_cut_across(graph: fx.Graph, context: PassContext) -> int:
    """Read [T, H, D] as [T, D, H] and turn it back: the same shape, other values."""
    node = next(n for n in calls(graph, aten.view.default) if n.meta["val"].dim() == 3)
    _, heads, width = node.meta["val"].shape
    with graph.inserting_after(node):
        wrong = context.call(
            graph, aten.view.default, node.args[0], [-1, width, heads], source=[node]
        )
    with graph.inserting_after(wrong):
        turned = context.call(graph, aten.permute.default, wrong, [0, 2, 1], source=[node])
    return drop(node, turned)


@plant("eliminate_views", "qwen3")
def a_transpose_lost(graph: fx.Graph, context: PassContext) -> int:
    """Read [T, H * D] as if heads had stood last."""
    flat = [n for n in calls(graph, aten.view.default) if n.meta["val"].dim() == 2]
    node = next(n for n in flat if n.args[0].meta["val"].dim() == 3)  # type: ignore[union-attr]
    source: Any = node.args[0]
    with graph.inserting_before(node):
        turned = context.call(graph, aten.permute.default, source, [0, 2, 1], source=[node])
        copy = context.call(graph, aten.clone.default, turned, source=[node])
        layout = {"memory_format": torch.contiguous_format}
        copy.kwargs = layout
    return set_argument([node], 0, lambda _: copy)


@plant("raise_expert_linear", "experts")
def another_expert(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aios.expert_linear.default)[0]
    chosen: Any = node.args[2]
    with graph.inserting_before(node):
        new = context.call(graph, aten.bitwise_xor.Scalar, chosen, 1, source=[node])
    return set_argument([node], 2, lambda _: new)


@plant("raise_expert_linear", "experts")
def rows_of_the_experts_reversed(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aios.expert_linear.default)[0]
    weight: Any = node.args[1]
    new = context.add_weight(graph, "turned", [weight], lambda w: torch.flip(w, [1]))
    return set_argument([node], 1, lambda _: new)


@plant("raise_expert_linear", "experts")
def rows_of_other_tokens(graph: fx.Graph, context: PassContext) -> int:
    """Multiply each choice with the row of another token, as a wrong repeat would."""
    node = calls(graph, aios.expert_linear.default)[0]
    x: Any = node.args[0]
    with graph.inserting_before(node):
        new = context.call(graph, aten.flip.default, x, [0], source=[node])
    return set_argument([node], 0, lambda _: new)
