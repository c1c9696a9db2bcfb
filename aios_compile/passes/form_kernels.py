"""Give every operation that is left its own kernel: the step to level 3.

Afterwards a graph holds kernel calls, views, region calls and sizes only. The body of a kernel is
its reference, and what an emitter reads to generate it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from aios_compile.ir.fusion import fuse_nodes
from aios_compile.ir.module import is_kernel_call
from aios_compile.ir.refresh import refresh_node
from aios_compile.passes.context import PassContext
from aios_compile.passes.fusion_groups import (
    NORMS,
    REDUCTIONS,
    RESHAPES,
    getitems,
    is_call,
    is_pointwise,
    is_view,
    kernel_name,
)
from aios_compile.passes.graph_pass import graph_pass

aten = torch.ops.aten
aios = torch.ops.aios
KINDS = {
    aten.embedding.default: "embedding",
    aios.linear.default: "linear",
    aios.bf16_linear.default: "bf16_linear",
    aios.expert_linear.default: "expert_linear",
    aios.quantized_linear.default: "quantized_linear",
    aios.quantized_expert_linear.default: "quantized_expert_linear",
    aios.quantized_embedding.default: "quantized_embedding",
    aios.rope.default: "rope",
    aios.kv_write.default: "kv_write",
    aios.quantized_kv_write.default: "kv_write",
    aios.paged_attention.default: "paged_attention",
    aios.attention.default: "attention",
    aios.sample.default: "sample",
    aten.mm.default: "matmul",
    aten.bmm.default: "matmul",
    aten.addmm.default: "matmul",
    aten.baddbmm.default: "matmul",
    aten.matmul.default: "matmul",
    aten.topk.default: "topk",
    aten.sort.default: "topk",
    aten.sort.stable: "topk",
    aten.index_select.default: "gather",
    aten.gather.default: "gather",
    aten.index.Tensor: "gather",
    aten.scatter.value: "pointwise",
    aten.scatter.src: "pointwise",
    aten.scatter_add.default: "pointwise",
    aten.slice_scatter.default: "pointwise",
    aten.cat.default: "pointwise",
    aten.stack.default: "pointwise",
    aten.full.default: "pointwise",
    aten.scalar_tensor.default: "pointwise",
    aten.arange.start_step: "pointwise",
    aten.arange.default: "pointwise",
    aten.repeat.default: "pointwise",
    **dict.fromkeys(NORMS, "row_reduction"),
    **dict.fromkeys(REDUCTIONS, "row_reduction"),
}


def kind_of(node: fx.Node) -> str:
    """Return the kind of kernel that computes a node alone; an unknown op is its own kind."""
    if node.target in KINDS:
        return KINDS[node.target]
    return "pointwise" if is_pointwise(node) else kernel_name([node])


@graph_pass(numerics="exact", required=True)
def form_kernels(graph: fx.Graph, context: PassContext) -> int:
    """Replace each operation that is not a view by the call of a kernel body.

    Before::

        def f(x: "f32[T, 64]", w: "weight f32[128, 64]"):
            y = aios.linear.default(x, w, None)
            return aten.view.default(y, [-1, 8, 16])

    After::

        def f(x: "f32[T, 64]", w: "weight f32[128, 64]"):
            @kernel("linear")
            def linear(x, w):
                return aios.linear.default(x, w, None)

            return aten.view.default(linear(x, w), [-1, 8, 16])
    """
    hits = 0
    for node in list(graph.nodes):  # strides as they are now: raised ops may lay results out anew
        if is_call(node, *RESHAPES):
            _as_view(graph, node, context)
        elif node.op != "call_module" or is_kernel_call(node):
            refresh_node(context.module, node)
    for node in [n for n in graph.nodes if _computes(n)]:
        group = [node, *(getitems(node) if _has_several_results(node) else [])]
        fuse_nodes(graph, group, kernel_name([node]), kind_of(node))
        hits += 1
    return hits


def _computes(node: fx.Node) -> bool:
    if node.op != "call_function" or is_view(node) or is_call(node, operator.getitem):
        return False
    return _has_several_results(node) or isinstance(node.meta.get("val"), torch.Tensor)


def _has_several_results(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


def _as_view(graph: fx.Graph, node: fx.Node, context: PassContext) -> None:
    """Write a reshape as a view, of a copy where the strides do not allow one."""
    source, shape = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    if node.target is aten.view.default and _is_viewable(node, context):
        refresh_node(context.module, node)
        return
    with graph.inserting_before(node):
        if not _is_viewable(node, context):
            source = context.call(
                graph,
                aten.clone.default,
                source,
                source=[node],
                memory_format=torch.contiguous_format,
            )
        view = context.call(graph, aten.view.default, source, shape, source=[node])
    node.replace_all_uses_with(view)
    graph.erase_node(node)


def _is_viewable(node: fx.Node, context: PassContext) -> bool:
    source: Any = node.args[0]
    try:
        with context.module.mode:
            aten.view.default(source.meta["val"], list(node.meta["val"].shape))
    except (RuntimeError, ValueError):
        return False
    return True
