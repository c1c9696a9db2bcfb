"""Copy outputs that are inputs or parts of other values, so that each output is a whole buffer.

Costs a launch where it fires; no decoder of the four families needs it. Without it, a caller would
have to read a view with the strides of a tensor that it does not know.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import outputs, placeholders
from aios_compile.ir.refresh import refresh_layouts
from aios_compile.passes.context import PassContext
from aios_compile.passes.graph_pass import graph_pass

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
RESIZES = (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.alias.default)
PARTS = (
    aten.permute.default, aten.transpose.int, aten.t.default, aten.slice.Tensor, aten.select.int,
    aten.expand.default, aten.split.Tensor, aten.split_with_sizes.default, aten.as_strided.default,
    aten.squeeze.dims,
)  # fmt: skip


@graph_pass(numerics="exact", required=True)
def own_outputs(graph: fx.Graph, context: PassContext) -> int:
    """Insert a copy before an output that is an input, a part of a value, or given out twice.

    Before::

        def f(x: "f32[T, 64]"):
            a = aten.relu.default(x)
            return aten.slice.Tensor(a, 1, 0, 32)

    After::

        def f(x: "f32[T, 64]"):
            a = aten.relu.default(x)
            b = aten.slice.Tensor(a, 1, 0, 32)
            return aten.clone.default(b, memory_format=torch.contiguous_format)
    """
    refresh_layouts(context.module, graph)
    values, seen, hits = outputs(graph), set(), 0
    for i, value in enumerate(values):
        source = _whole_source(value)
        if source is None or source in seen:
            with graph.inserting_before(graph.output_node()):
                values[i] = context.call(
                    graph,
                    aten.clone.default,
                    value,
                    memory_format=torch.contiguous_format,
                    source=[_origin(value)],
                )
            hits += 1
        seen.add(source)
    if hits:
        graph.output_node().args = (tuple(values),)
    if not context.region:
        hits += _agree_on_layouts(context)
    return hits


def _agree_on_layouts(context: PassContext) -> int:
    """Copy views that are given to regions; return how many. Regions then read dense values.

    All calls of a region must give the same strides, whatever later passes make of the views. A
    result that was a view of something may be a copy by now: the calls are told.
    """
    module, hits = context.module, 0
    for name, region in module.regions().items():
        calls = module.calls(name)
        for call in calls:
            call.meta["val"] = tuple(v.meta["val"] for v in outputs(region.graph))
            for item in call.users:
                index: Any = item.args[1]
                item.meta["val"] = call.meta["val"][index]
        for i, holder in enumerate(placeholders(region.graph)):
            hits += sum(_copy_argument(context, call, i) for call in calls)
            given = calls[0].args[i]
            assert isinstance(given, fx.Node)
            holder.meta["val"] = given.meta["val"]
    return hits


def _copy_argument(context: PassContext, call: fx.Node, index: int) -> int:
    value = call.args[index]
    assert isinstance(value, fx.Node)
    if value.meta["val"].is_contiguous():
        return 0
    with call.graph.inserting_before(call):
        copy = context.call(
            call.graph,
            aten.clone.default,
            value,
            memory_format=torch.contiguous_format,
            source=[_origin(value)],
        )
    call.args = (*call.args[:index], copy, *call.args[index + 1 :])
    return 1


def _whole_source(value: fx.Node) -> fx.Node | None:
    """Return the value whose whole dense memory an output is, or None if a copy is needed."""
    if not value.meta["val"].is_contiguous():
        return None
    node = value
    while node.op == "call_function":
        if node.target in RESHAPES or node.target in RESIZES:
            assert isinstance(node.args[0], fx.Node)
            node = node.args[0]
        elif node.target in PARTS or _is_part_item(node):
            return None
        else:
            return node
    return None if node.op == "placeholder" else node


def _is_part_item(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target in PARTS


def _origin(value: fx.Node) -> fx.Node:
    """Return a node with a model line: the value, a user, or (an input handed through) any."""
    candidates = (value, *value.users, *value.graph.nodes)
    return next((n for n in candidates if n.meta.get("stack_trace")), value)
