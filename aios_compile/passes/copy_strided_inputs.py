"""Copy the input of a linear whose last dimension is not dense: the kernel streams rows of k.

Costs a launch where it fires (a linear of every second column, say); no decoder of the four
families needs it.
"""

from __future__ import annotations

import torch
from torch import fx

from aios_compile.ir.refresh import refresh_node
from aios_compile.passes.context import PassContext
from aios_compile.passes.fusion_groups import is_call
from aios_compile.passes.graph_pass import graph_pass

aten, aios = torch.ops.aten, torch.ops.aios
LINEARS = (aios.linear.default, aios.bf16_linear.default, aios.quantized_linear.default)


@graph_pass(numerics="exact", required=True)
def copy_strided_inputs(graph: fx.Graph, context: PassContext) -> int:
    """Insert a contiguous copy before a linear of a view with gaps.

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
    for node in [n for n in graph.nodes if is_call(n, *LINEARS)]:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if x.op == "call_function":
            refresh_node(context.module, x)
        if x.meta["val"].stride()[-1] == 1:
            continue
        with graph.inserting_before(node):
            copy = context.call(
                graph,
                aten.clone.default,
                x,
                memory_format=torch.contiguous_format,
                source=[x, node],
            )
        node.replace_input_with(x, copy)
        hits += 1
    return hits
