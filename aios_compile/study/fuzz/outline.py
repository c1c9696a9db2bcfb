"""Move part of a captured program into a region, as a decoder layer is: patterns lie across it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from aios_compile.capture import torch_private
from aios_compile.ir import provenance
from aios_compile.ir.module import IRModule

REGION = "layer"


def outline(module: IRModule, begin: float, end: float) -> bool:
    """Make a region of the nodes between two fractions of the graph.

    Return whether it was possible: what crosses the border must be tensors. No result may be of
    T x T, a mask or scores, which no layer gives out and the compiler refuses; a layer is given
    masks, but no scores.
    """
    graph = module.root.graph
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    members = nodes[int(begin * len(nodes)) : int(end * len(nodes))]
    inside = set(members)
    if not members or any(graph_of is not graph for graph_of in {n.graph for n in members}):
        return False
    results = [n for n in members if any(u not in inside for u in n.users)]
    sources = list(dict.fromkeys(s for n in members for s in n.all_input_nodes if s not in inside))
    crossing = [*results, *sources]
    if not results or not sources or not all(_is_tensor(n) for n in crossing):
        return False
    if any(_token_dims(n) > 1 for n in results):
        return False
    if any(_token_dims(n) > 1 and _is_computed(n, module) for n in sources):
        return False
    region, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for source in sources:
        env[source] = region.placeholder(source.name)
        env[source].target = env[source].name
        env[source].meta = dict(source.meta)
    for node in members:
        env[node] = region.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
    region.output(tuple(env[r] for r in results))
    body = torch_private.lazy_graph_module(module.root, region)
    body.meta["aios_region"] = True
    module.root.add_submodule(REGION, body)
    _call(graph, members, sources, results)
    module.root.recompile()
    return True


def _call(
    graph: fx.Graph, members: list[fx.Node], sources: list[fx.Node], results: list[fx.Node]
) -> None:
    """Replace the members by a call of the region; the slice is convex: it is consecutive."""
    inside = set(members)
    with graph.inserting_before(members[0]):
        call = graph.call_module(REGION, tuple(sources))
        call.meta["val"] = tuple(r.meta["val"] for r in results)
        provenance.inherit(call, members)
        for i, result in enumerate(results):
            item = graph.call_function(operator.getitem, (call, i))
            item.meta["val"] = result.meta["val"]
            provenance.inherit(item, [result])
            result.replace_all_uses_with(item, lambda user: user not in inside)
    for node in reversed(members):
        graph.erase_node(node)


def _token_dims(node: fx.Node) -> int:
    return sum(not isinstance(size, int) for size in node.meta["val"].shape)


def _is_computed(node: fx.Node, module: IRModule) -> bool:
    """Return whether a value depends on activations, not on sizes, weights and positions alone."""
    seen, waiting = {node}, [node]
    while waiting:
        each = waiting.pop()
        given = each.op == "placeholder" and each.name not in module.weights
        if given and each.meta["val"].is_floating_point():
            return True
        if each.target is not torch.ops.aten.sym_size.int:
            waiting += [s for s in each.all_input_nodes if s not in seen]
            seen.update(each.all_input_nodes)
    return False


def _is_tensor(node: Any) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
