"""Move nodes of a graph into a kernel body: one call_module whose body computes them in eager."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from aios_compile.ir import provenance


def fuse_nodes(graph: fx.Graph, nodes: Sequence[fx.Node], name: str, kind: str) -> fx.Node:
    """Replace `nodes` by one call of a new kernel body and return the call.

    The body's placeholders are the outside values in order of first use; its outputs are the nodes
    that outside users need, in graph order (one value, or a tuple read through getitem). The group
    must be convex: no path may leave it and come back. `kind` is kept in the call's meta["kernel"];
    `name` is made unique among the module's children. Views may be inside a body.
    """
    owner = graph.owning_module
    assert owner is not None, "the graph belongs to no module"
    assert is_convex(nodes), f"{name}: the group is not convex"
    order = {n: i for i, n in enumerate(graph.nodes)}
    members = sorted(nodes, key=order.__getitem__)
    inside = set(members)
    results = [n for n in members if any(u not in inside for u in n.users)]
    assert results, f"{name}: nothing uses the group"
    body, arguments = _make_body(owner, members, results)
    body.meta["kernel"] = kind
    target = _unique_child(owner, name)
    owner.add_submodule(target, body)
    with graph.inserting_before(_insertion_point(graph, members)):
        call = graph.call_module(target, tuple(arguments))
        replacements = [call]
        if len(results) > 1:
            replacements = [
                graph.call_function(operator.getitem, (call, i)) for i in range(len(results))
            ]
    for result, new in zip(results, replacements):
        new.meta["val"] = result.meta["val"]
        provenance.inherit(new, members if new is call else [result])
        result.replace_all_uses_with(new, lambda user: user not in inside)
    if len(results) > 1:
        call.meta["val"] = tuple(r.meta["val"] for r in results)
        provenance.inherit(call, members)
    call.meta["kernel"] = kind
    for node in reversed(members):
        graph.erase_node(node)
    return call


def _make_body(
    owner: torch.nn.Module, members: Sequence[fx.Node], results: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Copy the members into a graph of their own; return it and the outside values it reads."""
    body, inside = fx.Graph(), set(members)
    env: dict[fx.Node, fx.Node] = {}
    arguments: list[fx.Node] = []
    for node in members:
        for source in node.all_input_nodes:
            if source not in inside and source not in env:
                env[source] = body.placeholder(source.name)
                env[source].meta = dict(source.meta)
                arguments.append(source)
    for node in members:
        env[node] = body.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    body.output(env[results[0]] if len(results) == 1 else tuple(env[r] for r in results))
    # The owner's own class below torch's class of one instance: lazy where the owner is.
    kind = type(owner).__mro__[1] if isinstance(owner, fx.GraphModule) else fx.GraphModule
    made = kind(owner, body)
    assert isinstance(made, fx.GraphModule)
    return made, arguments


def is_convex(nodes: Iterable[fx.Node]) -> bool:
    """Return whether no path between two of the nodes runs outside of them."""
    inside = set(nodes)
    order = {n: i for i, n in enumerate(next(iter(inside)).graph.nodes)}
    last = max(order[n] for n in inside)
    reached = {u for n in inside for u in n.users if u not in inside}
    stack = list(reached)
    while stack:
        node = stack.pop()
        if node in inside:
            return False
        for user in node.users:
            if user not in reached and order[user] <= last:
                reached.add(user)
                stack.append(user)
    return True


def _insertion_point(graph: fx.Graph, members: Sequence[fx.Node]) -> fx.Node:
    """Return a node before which all arguments exist and no outside user has run yet.

    The last member is right when every outside user comes after it; otherwise users of earlier
    results are moved behind the group, which convexity allows.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    inside = set(members)
    last = members[-1]
    early = {u for m in members for u in m.users if u not in inside and order[u] < order[last]}
    pending, moved = list(early), set(early)
    while pending:
        for user in pending.pop().users:
            if order[user] < order[last] and user not in moved and user not in inside:
                moved.add(user)
                pending.append(user)
    anchor = last
    for node in sorted(moved, key=order.__getitem__):
        anchor.append(node)
        anchor = node
    return last


def _unique_child(owner: torch.nn.Module, name: str) -> str:
    """Return `name`, numbered if the module has an attribute of that name already."""
    if not hasattr(owner, name):
        return name
    return next(f"{name}_{i}" for i in range(1, 10**6) if not hasattr(owner, f"{name}_{i}"))
