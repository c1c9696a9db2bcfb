"""Recompute every fake value, so that strides and dtypes are those that the graph really gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import IRModule, body_of, is_region_call, outputs, placeholders

aten = torch.ops.aten
# Keys of node.meta: what a value was made of, and the value.
MADE, RESHAPED = "aios_made", "aios_reshaped"
PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def refresh(module: IRModule) -> None:
    """Propagate fake values from the placeholders of root and regions through all graphs.

    A region's placeholders take the values of its first call, so a root change reaches them.
    """
    _refresh_graph(module, module.root)


def _refresh_graph(module: IRModule, graph_module: fx.GraphModule) -> None:
    done: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and is_region_call(graph_module, node):
            if str(node.target) not in done:
                _bind(node)
                _refresh_graph(module, body_of(node))
                done.add(str(node.target))
            node.meta["val"] = _result(body_of(node))
        else:
            refresh_node(module, node)


def refresh_layouts(module: IRModule, graph: fx.Graph) -> None:
    """Recompute the values of one graph before level 3, where a view may still mean a reshape.

    Region calls keep theirs. A pass leaves the strides of what comes after it as they were.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target in RESHAPES:
            _reshape(module, node)
        elif node.op == "call_function":
            refresh_node(module, node)


def refresh_node(module: IRModule, node: fx.Node) -> None:
    """Recompute the value of one operation or kernel call; placeholders keep theirs."""
    if node.op == "call_module":
        _bind(node)
        for inner in body_of(node).graph.nodes:
            if inner.op == "call_function" and inner.target in RESHAPES:
                _reshape_in_kernel(module, inner)
            else:
                refresh_node(module, inner)
        node.meta["val"] = _result(body_of(node))
    elif node.op == "call_function":
        node.meta["val"] = value_of(node, module)


def value_of(node: fx.Node, module: IRModule) -> Any:
    """Return what a node's target makes of the fake values of its arguments.

    The node remembers it while the arguments' values are the same objects: several passes refresh
    the same nodes, and a value with symbolic sizes takes 1 to 3 ms.
    """
    given = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    known = node.meta.get(MADE)
    if known is None or known[0] is not node.target or not _same(known[1], given):
        with module.mode, torch.no_grad():
            value = node.target(*given[0], **given[1])  # type: ignore[operator]
        known = node.meta[MADE] = (node.target, given, value)
    return known[2]


def _reshape(module: IRModule, node: fx.Node) -> None:
    """Lay a reshape's value out as its source is now."""
    source, value = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    known = node.meta.get(RESHAPED)
    if known is None or known[0] is not source or known[1] is not value:
        with module.mode:
            value = source.reshape(value.shape)
        node.meta[RESHAPED] = (source, value)
        node.meta["val"] = value


def _reshape_in_kernel(module: IRModule, node: fx.Node) -> None:
    """Refresh a reshape of a body: index arithmetic, which need not be a view of its source now."""
    try:
        refresh_node(module, node)
    except (RuntimeError, ValueError):
        node.target = aten.reshape.default
        refresh_node(module, node)


def _same(known: Any, given: Any) -> bool:
    """Return whether arguments are equal; tensors and sizes are if they are the same object."""
    if known is given:
        return True
    if isinstance(known, (list, tuple)) and isinstance(given, (list, tuple)):
        return len(known) == len(given) and all(map(_same, known, given))
    if isinstance(known, dict) and isinstance(given, dict):
        return known.keys() == given.keys() and all(_same(known[k], given[k]) for k in known)
    return type(known) is type(given) and isinstance(known, PLAIN) and known == given


def _bind(call: fx.Node) -> None:
    for holder, argument in zip(placeholders(body_of(call).graph), call.args):
        assert isinstance(argument, fx.Node)
        holder.meta["val"] = argument.meta["val"]


def _result(body: fx.GraphModule) -> Any:
    raw = body.graph.output_node().args[0]
    if isinstance(raw, fx.Node):
        return raw.meta["val"]
    return tuple(v.meta["val"] for v in outputs(body.graph))
