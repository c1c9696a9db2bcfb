"""Recompute every fake value: after it, strides and dtypes are what the graph really gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import IRModule, body_of, is_region_call, outputs, placeholders

aten = torch.ops.aten
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
            with module.mode:
                source = node.args[0].meta["val"]
                node.meta["val"] = source.reshape(node.meta["val"].shape)
        elif node.op == "call_function":
            refresh_node(module, node)


def refresh_node(module: IRModule, node: fx.Node) -> None:
    """Recompute the value of one operation or kernel call; placeholders keep theirs."""
    if node.op == "call_module":
        _bind(node)
        for inner in body_of(node).graph.nodes:
            refresh_node(module, inner)
        node.meta["val"] = _result(body_of(node))
    elif node.op == "call_function":
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with module.mode, torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _bind(call: fx.Node) -> None:
    for holder, argument in zip(placeholders(body_of(call).graph), call.args):
        assert isinstance(argument, fx.Node)
        holder.meta["val"] = argument.meta["val"]


def _result(body: fx.GraphModule) -> Any:
    raw = body.graph.output_node().args[0]
    if isinstance(raw, fx.Node):
        return raw.meta["val"]
    return tuple(v.meta["val"] for v in outputs(body.graph))
