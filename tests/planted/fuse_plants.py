"""Mistakes of the passes that own, copy and fuse: what is inside a kernel body is part of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import body_of
from aios_compile.passes.context import PassContext
from tests.planted.plants import calls, drop, plant, set_argument, swap

aten, aios = torch.ops.aten, torch.ops.aios


def kernels(graph: fx.Graph, kind: str) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_module" and n.meta.get("kernel") == kind]


def inside(graph: fx.Graph, kind: str, *targets: Any) -> list[fx.Node]:
    """Return the calls of `targets` in the bodies of the kernels of a kind."""
    found = [calls(body_of(n).graph, *targets) for n in kernels(graph, kind)]
    return [node for nodes in found for node in nodes]


@plant("own_outputs", "parts")
def another_part_is_copied(graph: fx.Graph, context: PassContext) -> int:
    copy = calls(graph, aten.clone.default)[0]
    piece: Any = copy.args[0]
    with graph.inserting_before(copy):
        source, dim, *_ = piece.args
        new = context.call(graph, aten.slice.Tensor, source, dim, 0, 32, source=[piece])
    return set_argument([copy], 0, lambda _: new)


@plant("own_outputs", "parts")
def outputs_swapped(graph: fx.Graph, context: PassContext) -> int:
    node = calls(graph, aten.clone.default)[-1]
    with graph.inserting_before(node):
        new = context.call(graph, aten.relu.default, node.args[0], source=[node])
    return set_argument([node], 0, lambda _: new)


@plant("own_outputs", "parts")
def copied_before_it_is_computed(graph: fx.Graph, context: PassContext) -> int:
    """Copy the same part of what the value was computed of."""
    copy = calls(graph, aten.clone.default)[0]
    piece: Any = copy.args[0]
    with graph.inserting_before(copy):
        x, *cut = piece.args
        new = context.call(graph, aten.slice.Tensor, x.args[0], *cut, source=[piece])
    return set_argument([copy], 0, lambda _: new)


def _copy_another(graph: fx.Graph, context: PassContext, *cut: int) -> int:
    copy = calls(graph, aten.clone.default)[0]
    x: Any = copy.args[0].args[0]  # type: ignore[union-attr]
    with graph.inserting_before(copy):
        new = context.call(graph, aten.slice.Tensor, x, *cut, source=[copy])
    return set_argument([copy], 0, lambda _: new)


@plant("copy_strided_inputs", "strided")
def offset_of_the_copy_wrong(graph: fx.Graph, context: PassContext) -> int:
    """Copy every second column, from the second one on."""
    return _copy_another(graph, context, 1, 1, 64, 2)


@plant("copy_strided_inputs", "strided")
def copy_read_backwards(graph: fx.Graph, context: PassContext) -> int:
    copy = calls(graph, aten.clone.default)[0]
    with graph.inserting_after(copy):
        new = context.call(graph, aten.flip.default, copy, [1], source=[copy])
    copy.replace_all_uses_with(new, lambda user: user is not new)
    return 1


@plant("copy_strided_inputs", "strided")
def neighbours_copied(graph: fx.Graph, context: PassContext) -> int:
    """Copy columns 0..31 instead of every second one."""
    return _copy_another(graph, context, 1, 0, 32)


@plant("fuse_qk_norm_rope_kv_write", "qwen3")
def norms_of_q_and_k_swapped(graph: fx.Graph, context: PassContext) -> int:
    q, k = inside(graph, "qk_norm_rope_kv_write", aios.rms_norm.default)
    wq, wk = q.args[1], k.args[1]
    return set_argument([q], 1, lambda _: wk) + set_argument([k], 1, lambda _: wq)


@plant("fuse_qk_norm_rope_kv_write", "qwen3")
def norm_behind_the_rotation(graph: fx.Graph, context: PassContext) -> int:
    rope = inside(graph, "qk_norm_rope_kv_write", aios.rope.default)[-1]
    norm: Any = rope.args[0]
    body = rope.graph
    users = list(rope.users)
    with body.inserting_after(rope):
        late = context.call(body, aios.rms_norm.default, rope, *norm.args[1:], source=[norm])
    for user in users:
        user.replace_input_with(rope, late)
    return set_argument([rope], 0, lambda _: norm.args[0])


@plant("fuse_qk_norm_rope_kv_write", "window")
def unrotated_key_is_written(graph: fx.Graph, context: PassContext) -> int:
    write = inside(graph, "qk_norm_rope_kv_write", aios.kv_write.default)[0]
    return set_argument([write], 0, lambda k: k.args[0])


@plant("fuse_qk_norm_rope_kv_write", "qwen3")
def epsilon_of_the_head_norm(graph: fx.Graph, context: PassContext) -> int:
    norms = inside(graph, "qk_norm_rope_kv_write", aios.rms_norm.default)
    return set_argument(norms[:1], 2, lambda eps: eps * 10)


@plant("fuse_qk_norm_rope_kv_write", "wide")
def epsilon_below_the_roundings(graph: fx.Graph, context: PassContext) -> int:
    """Where queries are sums of 512 products, their epsilon is nothing beside them."""
    norms = inside(graph, "qk_norm_rope_kv_write", aios.rms_norm.default)
    return set_argument(norms[:1], 2, lambda eps: eps * 2)


@plant("fuse_kv_write_into_attention", "triton")
def rotation_of_the_key_left_out(graph: fx.Graph, context: PassContext) -> int:
    write = inside(graph, "kv_write_attention", aios.kv_write.default)[0]
    return set_argument([write], 0, lambda k: k.args[0])


@plant("fuse_kv_write_into_attention", "triton")
def caches_before_the_write_are_read(graph: fx.Graph, context: PassContext) -> int:
    attention = inside(graph, "kv_write_attention", aios.paged_attention.default)[0]
    write = inside(graph, "kv_write_attention", aios.kv_write.default)[0]
    return sum(set_argument([attention], i + 1, lambda _, i=i: write.args[i + 2]) for i in (0, 1))


@plant("fuse_kv_write_into_attention", "triton")
def scale_of_the_fused_attention(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "kv_write_attention", aios.paged_attention.default)
    return set_argument(found, 6, lambda scale: scale * 1.01)


@plant("fuse_norm_into_linear", "triton")
def norm_left_out(graph: fx.Graph, context: PassContext) -> int:
    node = inside(graph, "linear", aios.rms_norm.default)[0]
    return drop(node, node.args[0])


@plant("fuse_norm_into_linear", "triton")
def norm_without_its_weight(graph: fx.Graph, context: PassContext) -> int:
    return set_argument(inside(graph, "linear", aios.rms_norm.default), 1, lambda weight: None)


@plant("fuse_norm_into_linear", "triton")
def gate_and_up_swapped_behind_the_norm(graph: fx.Graph, context: PassContext) -> int:
    return swap(inside(graph, "linear", aios.gated_activation.default)[0], 0, 1)


@plant("fuse_add_rms_norm", "qwen3")
def dropped_residual(graph: fx.Graph, context: PassContext) -> int:
    node = inside(graph, "row_reduction", aten.add.Tensor)[0]
    return drop(node, node.args[1])


@plant("fuse_add_rms_norm", "qwen3")
def norm_of_one_summand(graph: fx.Graph, context: PassContext) -> int:
    node = inside(graph, "row_reduction", aios.rms_norm.default)[0]
    return set_argument([node], 0, lambda total: total.args[0])


@plant("fuse_add_rms_norm", "qwen3")
def results_of_the_kernel_swapped(graph: fx.Graph, context: PassContext) -> int:
    output = body_of(kernels(graph, "row_reduction")[0]).graph.output_node()
    (values,) = output.args
    output.args = (tuple(reversed(values)),)  # type: ignore[arg-type]
    return 1


@plant("fuse_add_rms_norm", "gemma2")
def residual_added_before_the_norm(graph: fx.Graph, context: PassContext) -> int:
    for node in inside(graph, "row_reduction", aten.add.Tensor):
        a, b = node.args
        for norm, other in ((a, b), (b, a)):
            if getattr(norm, "target", None) is aios.rms_norm.default:
                set_argument([norm], 0, lambda x, other=other: other)
                return 1
    return 0


@plant("fuse_linear_epilogue", "qwen3")
def residual_lost_in_the_epilogue(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "linear", aten.add.Tensor)
    node = found[-1]
    linear = next(a for a in node.args if getattr(a, "target", None) is aios.linear.default)
    return drop(node, linear)


@plant("fuse_linear_epilogue", "qwen3")
def halves_of_the_gate_swapped(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "linear", aios.gated_activation.default)
    return swap(found[0], 0, 1) if found else 0


@plant("fuse_linear_epilogue", "qwen3")
def activation_lost(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "linear", aios.gated_activation.default)
    return drop(found[0], found[0].args[1]) if found else 0


@plant("fuse_linear_epilogue", "gemma2")
def soft_cap_of_the_logits(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "linear", aten.tanh.default)
    return drop(found[0], found[0].args[0]) if found else 0


@plant("fuse_linear_epilogue", "qwen3")
def product_added_to_itself(graph: fx.Graph, context: PassContext) -> int:
    for node in inside(graph, "linear", aten.add.Tensor):
        linear = next(a for a in node.args if getattr(a, "target", None) is aios.linear.default)
        node.args = (linear, linear)
        return 1
    return 0


@plant("fuse_pointwise", "qwen3")
def half_of_the_table_doubled(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "pointwise", aten.cos.default)
    return drop(found[0], found[0].args[0]) if found else 0


@plant("fuse_pointwise", "qwen3")
def tables_given_out_swapped(graph: fx.Graph, context: PassContext) -> int:
    for node in kernels(graph, "pointwise"):
        output = body_of(node).graph.output_node()
        (values,) = output.args
        if isinstance(values, tuple) and len(values) == 2:
            output.args = (tuple(reversed(values)),)
            return 1
    return 0


@plant("fuse_pointwise", "qwen3")
def positions_end_at_64(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "pointwise", aten.cos.default)[:1]
    for node in found:
        angle: Any = node.args[0]
        with node.graph.inserting_before(node):
            low = context.call(node.graph, aten.clamp.default, angle, None, 64.0, source=[node])
        node.args = (low,)
    return len(found)


@plant("fuse_pointwise", "qwen3")
def constant_rounded(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "row_reduction", aios.rms_norm.default)
    return set_argument(found, 2, lambda eps: 0.0)


@plant("form_kernels", "qwen3")
def operands_of_a_linear_swapped(graph: fx.Graph, context: PassContext) -> int:
    """Bind two kernels of one shape to each other's weights."""
    found = [n for n in kernels(graph, "linear") if len(n.args) == 2]
    shapes = [tuple(n.args[1].meta["val"].shape) for n in found]  # type: ignore[union-attr]
    for i, a in enumerate(found):
        rows, columns = shapes[i]
        if rows == columns:
            return set_argument(
                calls(body_of(a).graph, aios.linear.default), 0, lambda x: _negated(x, context)
            )
    return 0


def _negated(x: Any, context: PassContext) -> fx.Node:
    with x.graph.inserting_after(x):
        return context.call(x.graph, aten.neg.default, x, source=[x])


@plant("form_kernels", "window")
def window_off_by_one_in_the_body(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "paged_attention", aios.paged_attention.default)
    return set_argument(found, 7, lambda window: window - 1)


@plant("form_kernels", "qwen3")
def window_where_there_is_none(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "paged_attention", aios.paged_attention.default)
    return set_argument(found, 7, lambda window: 4096)


@plant("form_kernels", "wide_window")
def wide_window_off_by_one_in_the_body(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "paged_attention", aios.paged_attention.default)
    return set_argument(found, 7, lambda window: window - 1)


@plant("form_kernels", "huge_window")
def huge_window_off_by_one_in_the_body(graph: fx.Graph, context: PassContext) -> int:
    found = inside(graph, "paged_attention", aios.paged_attention.default)
    return set_argument(found, 7, lambda window: window - 1)


@plant("form_kernels", "qwen3")
def a_view_of_other_rows(graph: fx.Graph, context: PassContext) -> int:
    found = calls(graph, aten.slice.Tensor)
    pairs = [(a, b) for a in found for b in found if a.args[0] is b.args[0] and a is not b]
    same = [(a, b) for a, b in pairs if a.meta["val"].shape == b.meta["val"].shape]
    if not same:
        return 0
    a, b = same[0]
    a.args, b.args = b.args, a.args
    return 1
