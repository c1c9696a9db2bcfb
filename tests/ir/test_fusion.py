"""fuse_nodes and is_convex: bodies, results, order, and networkx as the oracle of convexity."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

import itertools
import random
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.fusion import fuse_nodes, is_convex
from aios_compile.ir.module import body_of, outputs, placeholders
from tests.passes import helpers

aten = torch.ops.aten


def graph_of(seed: int, size: int) -> fx.Graph:
    """Return a random graph of sums."""
    rng = random.Random(seed)
    graph = fx.Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    for _ in range(size):
        nodes.append(graph.call_function(aten.add.Tensor, (rng.choice(nodes), rng.choice(nodes))))
    graph.output(tuple(nodes[2:]))
    return graph


def convex_by_networkx(graph: fx.Graph, group: set[fx.Node]) -> bool:
    edges = nx.DiGraph([(a, b) for a in graph.nodes for b in a.users])
    outside = [n for n in graph.nodes if n not in group]
    edges.add_nodes_from(graph.nodes)
    reach = {n: nx.descendants(edges, n) for n in graph.nodes}
    return not any(
        o in reach[a] and b in reach[o] for o in outside for a, b in itertools.product(group, group)
    )


@pytest.mark.parametrize("seed", range(30))
def test_convexity_agrees_with_networkx(seed: int) -> None:
    graph = graph_of(seed, 8)
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    rng = random.Random(seed)
    for _ in range(20):
        group = set(rng.sample(nodes, rng.randint(1, 4)))
        assert is_convex(group) == convex_by_networkx(graph, group), group


@pytest.mark.parametrize("seed", range(15))
def test_any_convex_group_can_be_fused(seed: int) -> None:
    rng, tried = random.Random(seed), 0
    arguments = (torch.tensor(1.0), torch.tensor(3.0))
    while tried < 4:
        graph = graph_of(seed + 100 * tried, 9)
        for node in graph.nodes:
            node.meta["val"] = torch.empty(())
        module = fx.GraphModule(torch.nn.Module(), graph)
        want = module(*arguments)
        nodes = [n for n in module.graph.nodes if n.op == "call_function"]
        group = set(rng.sample(nodes, rng.randint(1, 5)))
        tried += 1
        if not is_convex(group):
            with pytest.raises(AssertionError, match="not convex"):
                fuse_nodes(module.graph, list(group), "sum", "pointwise")
            continue
        fuse_nodes(module.graph, list(group), "sum", "pointwise")
        module.graph.lint()
        module.recompile()
        assert module(*arguments) == want


def names(nodes: list[Any]) -> list[str]:
    return [n.name for n in nodes]


def test_inputs_come_in_order_of_use_and_results_in_graph_order() -> None:
    def f(x: "f32[T, 4]", y: "f32[T, 4]", w: "weight f32[4]") -> Any:
        a = y * w
        b = a + x
        return b.exp(), a

    module = helpers.trace(f)
    graph = module.root.graph
    product, total, exp = (n for n in graph.nodes if n.op == "call_function")
    call = fuse_nodes(graph, [total, product], "mul_add", "pointwise")
    assert names(list(call.args)) == ["y", "w", "x"] == names(placeholders(body_of(call).graph))
    assert [n.target for n in outputs(body_of(call).graph)] == [aten.mul.Tensor, aten.add.Tensor]
    assert [tuple(v.shape) for v in call.meta["val"]] == [tuple(exp.meta["val"].shape)] * 2
    assert body_of(call).meta["kernel"] == call.meta["kernel"] == "pointwise"


def test_a_single_result_is_no_tuple() -> None:
    def f(x: "f32[T, 4]") -> Any:
        return x.exp().sin()

    module = helpers.trace(f)
    nodes = [n for n in module.root.graph.nodes if n.op == "call_function"]
    call = fuse_nodes(module.root.graph, nodes, "exp_sin", "pointwise")
    assert isinstance(call.meta["val"], torch.Tensor)
    assert outputs(module.root.graph) == [call]


def test_the_call_names_every_model_line() -> None:
    def f(x: "f32[T, 4]") -> Any:
        return x.exp().sin()

    module = helpers.trace(f)
    nodes = [n for n in module.root.graph.nodes if n.op == "call_function"]
    for i, node in enumerate(nodes):
        node.meta["stack_trace"] = f'File "model.py", line {i + 1}, in forward\n    line {i + 1}'
    call = fuse_nodes(module.root.graph, nodes, "exp_sin", "pointwise")
    lines = provenance.source_lines(call)
    assert [line.split(" ")[0] for line in lines] == ["model.py:1", "model.py:2"]


def test_names_are_unique_and_never_hide_an_attribute() -> None:
    def f(x: "f32[T, 4]") -> Any:
        return x.exp(), x.sin(), x.cos()

    module = helpers.trace(f)
    nodes = [n for n in module.root.graph.nodes if n.op == "call_function"]
    targets = [
        str(fuse_nodes(module.root.graph, [n], name, "pointwise").target)
        for n, name in zip(nodes, ("graph", "exp", "exp"))
    ]
    assert targets == ["graph_1", "exp", "exp_1"]
    assert isinstance(module.root.graph, fx.Graph)


def test_a_group_that_nothing_uses_is_an_error() -> None:
    graph = fx.Graph()
    node = graph.call_function(aten.add.Tensor, (graph.placeholder("x"), 1))
    graph.output(())
    owner = fx.GraphModule(torch.nn.Module(), graph)
    node = next(n for n in owner.graph.nodes if n.op == "call_function")
    with pytest.raises(AssertionError, match="nothing uses the group"):
        fuse_nodes(owner.graph, [node], "add", "pointwise")
