"""Copy what linears, rope and attention read where its last dimension is not dense.

Their kernels stream rows. Costs a launch where it fires (a linear of every second column, say); no
decoder of the four families needs it. The Triton kernels of heads bake distances in, so there heads
whose distance depends on T (each head's tokens side by side) are copied too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir.refresh import refresh_layouts
from aios_compile.passes.context import PassContext
from aios_compile.passes.fusion_groups import is_call
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.head_views import distances_vary

aten, aios = torch.ops.aten, torch.ops.aios
STREAMED: dict[Any, tuple[int, ...]] = {  # the arguments that are read as rows
    aios.linear.default: (0,),
    aios.bf16_linear.default: (0,),
    aios.quantized_linear.default: (0,),
    aios.expert_linear.default: (0,),
    aios.quantized_expert_linear.default: (0,),
    aios.rope.default: (0, 1, 2),
    aios.kv_write.default: (0, 1),
    aios.quantized_kv_write.default: (0, 1),
    aios.paged_attention.default: (0,),
}
OF_HEADS = (  # what fuse_kv_write_into_attention may take in
    aios.rms_norm.default,
    aios.rope.default,
    aios.kv_write.default,
    aios.quantized_kv_write.default,
    aios.paged_attention.default,
)


@graph_pass(numerics="exact", required=True)
def copy_strided_inputs(graph: fx.Graph, context: PassContext) -> int:
    """Insert a contiguous copy before a linear (rope, attention) of a view with gaps.

    Before::

        def f(x: "f32[T, 64]", w: "weight f32[128, 32]"):
            a = aten.slice.Tensor(x, 1, 0, 64, 2)
            return aios.linear.default(a, w, None)

    After::

        def f(x: "f32[T, 64]", w: "weight f32[128, 32]"):
            a = aten.slice.Tensor(x, 1, 0, 64, 2)
            b = aten.clone.default(a, memory_format=torch.contiguous_format)
            return aios.linear.default(b, w, None)
    """
    hits = 0
    refresh_layouts(context.module, graph)  # own_outputs changed layouts upstream
    for node in [n for n in graph.nodes if is_call(n, *STREAMED, *OF_HEADS)]:
        baked = context.options.target == "triton" and node.target in OF_HEADS
        for index in STREAMED.get(node.target, (0,) if baked else ()):
            hits += _copy_if_strided(graph, node, index, context, baked)
    return hits


def _copy_if_strided(
    graph: fx.Graph, node: fx.Node, index: int, context: PassContext, baked: bool
) -> int:
    x = node.args[index]
    assert isinstance(x, fx.Node)
    dense = x.meta["val"].stride()[-1] == 1 or node.target is aios.rms_norm.default
    if dense and not (baked and distances_vary(x)):
        return 0
    with graph.inserting_before(node):
        copy = context.call(
            graph,
            aten.clone.default,
            x,
            memory_format=torch.contiguous_format,
            source=[x, node],
        )
    node.args = (*node.args[:index], copy, *node.args[index + 1 :])
    return 1
