"""Copy what linears, rope and attention read where its last dimension is not dense.

Their kernels stream rows. Costs a launch where it fires (a linear of every second column, say); no
decoder of the four families needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir.refresh import refresh_node
from aios_compile.passes.context import PassContext
from aios_compile.passes.fusion_groups import RESHAPES, is_call
from aios_compile.passes.graph_pass import graph_pass

aten, aios = torch.ops.aten, torch.ops.aios
STREAMED: dict[Any, tuple[int, ...]] = {  # the arguments that are read as rows
    aios.linear.default: (0,),
    aios.bf16_linear.default: (0,),
    aios.quantized_linear.default: (0,),
    aios.expert_linear.default: (0,),
    aios.rope.default: (0, 1, 2),
    aios.kv_write.default: (0, 1),
    aios.quantized_kv_write.default: (0, 1),
    aios.paged_attention.default: (0,),
}


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
    for node in [n for n in graph.nodes if is_call(n, *STREAMED)]:
        for index in STREAMED[node.target]:
            hits += _copy_if_strided(graph, node, index, context)
    return hits


def _copy_if_strided(graph: fx.Graph, node: fx.Node, index: int, context: PassContext) -> int:
    x = node.args[index]
    assert isinstance(x, fx.Node)
    if x.op == "call_function" and not is_call(x, *RESHAPES):
        refresh_node(context.module, x)
    value = x.meta["val"]
    if value.stride()[-1] == 1:
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
