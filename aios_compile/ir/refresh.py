"""Recompute every fake value: after it, strides and dtypes are what the graph really gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import IRModule, body_of, is_region_call, outputs, placeholders


def refresh(module: IRModule) -> None:
    """Propagate fake values from the placeholders of root and regions through all graphs.

    A region's placeholders take the values of its first call, so a root change reaches them.
    """
    _refresh_graph(module, module.root)


def _refresh_graph(module: IRModule, graph_module: fx.GraphModule) -> None:
    done: set[str] = set()
    with module.mode, torch.no_grad():
        for node in graph_module.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
            elif node.op == "call_module":
                body = body_of(node)
                if not is_region_call(graph_module, node) or str(node.target) not in done:
                    for holder, argument in zip(placeholders(body.graph), node.args):
                        assert isinstance(argument, fx.Node)
                        holder.meta["val"] = argument.meta["val"]
                    _refresh_graph(module, body)
                    done.add(str(node.target))
                node.meta["val"] = _result(body)


def _result(body: fx.GraphModule) -> Any:
    raw = body.graph.output_node().args[0]
    if isinstance(raw, fx.Node):
        return raw.meta["val"]
    return tuple(v.meta["val"] for v in outputs(body.graph))
