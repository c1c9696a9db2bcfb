"""Compute every activation in float32; weights keep their stored half precision.

Vector units multiply float32, and each store of a half-precision activation would cost a rounding
and a conversion; activations are a small part of the bytes of a step, weights are nearly all.
Upcasting a weight where it is used is exact, and the kernels do it while they load it. Both targets
then compute the same numbers, and each is an oracle for the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.ir.module import is_region_call, outputs, placeholders
from aios_compile.passes.context import PassContext, fake_value
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import HALF, dtype_of, is_call

aten = torch.ops.aten
LOOKUP = aten.embedding.default


@graph_pass(numerics="lossy", required=True)
def widen_activations(graph: fx.Graph, context: PassContext) -> int:
    """Make half-precision activations float32 and upcast weights where they are used.

    A table that is looked up stays as it is: its rows are upcast after the lookup. Returns
    the number of values that became float32.

    Before::

        def f(x: "bf16[T, 64]", w: "weight bf16[64]"):
            h = aten._to_copy.default(x, dtype=torch.float32)
            h = aten._to_copy.default(aten.exp.default(h), dtype=torch.bfloat16)
            return aten.mul.Tensor(w, h)

    After::

        def f(x: "f32[T, 64]", w: "weight bf16[64]"):
            h = aten.exp.default(x)
            return aten.mul.Tensor(aten._to_copy.default(w, dtype=torch.float32), h)
    """
    weights = {n for n in placeholders(graph) if context.is_weight(n)}
    hits = _widen_inputs(graph, context, weights)
    for node in list(graph.nodes):
        if node.op not in ("placeholder", "get_attr"):
            hits += _widen(graph, node, context, weights)
    if hits and context.region:
        _narrow_at_calls(graph, context)
    return hits


def _is_half(node: Any) -> bool:
    return dtype_of(node) in HALF


def _widen_inputs(graph: fx.Graph, context: PassContext, weights: set[fx.Node]) -> int:
    """Make half-precision inputs float32; the calls of a region cast what they pass."""
    hits = 0
    root = context.module.root.graph
    for i, node in enumerate(placeholders(graph)):
        if node in weights or not _is_half(node):
            continue
        node.meta["val"] = _float32(node.meta["val"], context)
        hits += 1
        for call in context.module.calls(context.region) if context.region else ():
            with root.inserting_before(call):
                source = call.args[i]
                assert isinstance(source, fx.Node)
                new = _cast(root, source, torch.float32, context)
            call.args = (*call.args[:i], new, *call.args[i + 1 :])
    return hits


def _narrow_at_calls(graph: fx.Graph, context: PassContext) -> None:
    """Cast the region's results back at its calls, which widening the outer graph undoes."""
    root = context.module.root.graph
    values = tuple(n.meta["val"] for n in outputs(graph))
    for call in context.module.calls(context.region):
        before, call.meta["val"] = call.meta["val"], values
        for item in list(call.users):
            index = int(item.args[1])  # type: ignore[arg-type]
            item.meta["val"] = values[index]
            if values[index].dtype != before[index].dtype:
                with root.inserting_after(item):
                    new = _cast(root, item, before[index].dtype, context)
                _use_instead(item, new)


def _widen(graph: fx.Graph, node: fx.Node, context: PassContext, weights: set[fx.Node]) -> int:
    """Widen one node whose inputs are wide already; return 1 if it was half precision."""
    half = _is_half(node)
    if is_call(node, LOOKUP) and node.args[0] in weights:
        return _widen_lookup(graph, node, context) if half else 0
    graph_module = graph.owning_module
    assert graph_module is not None
    if node.op == "call_module" and is_region_call(graph_module, node):
        return 0
    _upcast_weights(graph, node, context, weights)
    if node.kwargs.get("dtype") in HALF:
        node.kwargs = {**node.kwargs, "dtype": torch.float32}
    if node.op == "output" or not _changed(node, context):
        return 0
    source = node.args[0] if node.args else None
    only_casts = is_call(node, aten._to_copy.default) and set(node.kwargs) == {"dtype"}
    if only_casts and dtype_of(source) == node.kwargs["dtype"]:
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    return 1


def _changed(node: fx.Node, context: PassContext) -> bool:
    """Recompute a node's fake value; return whether a dtype is another one now."""
    before = node.meta["val"]
    if not _touches_float(node):
        return False
    after = fake_value(node, context.module)
    node.meta["val"] = after
    return _dtypes(before) != _dtypes(after) or _is_wide_noop(node)


def _is_wide_noop(node: fx.Node) -> bool:
    """Return whether a cast to float32 casts a float32 now."""
    if not is_call(node, aten._to_copy.default):
        return False
    return dtype_of(node.args[0]) == torch.float32 == dtype_of(node)


def _touches_float(node: fx.Node) -> bool:
    values = [node.meta["val"], *(n.meta.get("val") for n in node.all_input_nodes)]
    return any(d is not None and d.is_floating_point for v in values for d in _dtypes(v))


def _dtypes(value: Any) -> list[torch.dtype]:
    items = value if isinstance(value, (tuple, list)) else [value]
    return [v.dtype for v in items if isinstance(v, Tensor)]


def _upcast_weights(
    graph: fx.Graph, node: fx.Node, context: PassContext, weights: set[fx.Node]
) -> None:
    if is_call(node, aten._to_copy.default):
        return
    for source in node.all_input_nodes:
        if source in weights and _is_half(source):
            with graph.inserting_before(node):
                node.replace_input_with(source, _cast(graph, source, torch.float32, context))


def _widen_lookup(graph: fx.Graph, node: fx.Node, context: PassContext) -> int:
    cast = next((u for u in node.users if is_call(u, aten._to_copy.default)), None)
    if cast is not None and len(node.users) == 1 and cast.meta["val"].dtype == torch.float32:
        return 0
    with graph.inserting_after(node):
        new = _cast(graph, node, torch.float32, context)
    _use_instead(node, new)
    return 1


def _use_instead(node: fx.Node, cast: fx.Node) -> None:
    node.replace_all_uses_with(cast, lambda user: user is not cast)


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype, context: PassContext) -> fx.Node:
    return context.call(graph, aten._to_copy.default, node, dtype=dtype, source=[node])


def _float32(value: Tensor, context: PassContext) -> Tensor:
    with context.module.mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=torch.float32)
