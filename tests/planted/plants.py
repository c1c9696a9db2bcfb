"""Wrong passes: each is a right pass of the pipeline, followed by one mistake in what it made.

A plant says which pass makes the mistake, on which program (tests/planted/programs.py), and edits
the graph that the pass returned, as a slip in its code would have left it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from aios_compile.ir.module import Recipe, body_of, is_kernel_call, placeholders
from aios_compile.passes.context import PassContext
from aios_compile.passes.graph_pass import PassFunction, info_of

Corrupt = Callable[[fx.Graph, PassContext], int]


@dataclass(frozen=True)
class Plant:
    """One mistake: it returns how many nodes it spoiled, 0 where it found nothing to spoil."""

    pass_name: str
    program: str
    name: str
    corrupt: Corrupt

    def apply_to(self, function: PassFunction) -> PassFunction:
        """Return the pass with the mistake in it, under the same name."""

        def wrong(graph: fx.Graph, context: PassContext) -> int:
            hits = function(graph, context)
            try:
                spoiled.append(self.corrupt(graph, context))
            except (StopIteration, LookupError, ValueError):
                spoiled.append(0)  # this graph of the program has nothing of the kind
            return hits + spoiled[-1]

        spoiled: list[int] = []
        wrong.info, wrong.spoiled = info_of(function), spoiled  # type: ignore[attr-defined]
        return wrong


PLANTS: list[Plant] = []


def plant(pass_name: str, program: str) -> Callable[[Corrupt], Corrupt]:
    """Register a mistake of `pass_name`, shown on `program`."""

    def declare(corrupt: Corrupt) -> Corrupt:
        PLANTS.append(Plant(pass_name, program, corrupt.__name__, corrupt))
        return corrupt

    return declare


def calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    """Return the calls of `targets` in a graph and in the kernel bodies that it calls."""
    bodies = [body_of(n).graph for n in graph.nodes if is_kernel_call(n)]
    graphs = [graph, *bodies]
    return [n for g in graphs for n in g.nodes if n.op == "call_function" and n.target in targets]


def set_argument(nodes: list[fx.Node], index: int, change: Callable[[Any], Any]) -> int:
    """Replace argument `index` of each node by `change` of it; return how many changed."""
    spoiled = 0
    for node in nodes:
        args = list(node.args)
        new = change(args[index])
        spoiled += new is not args[index]
        args[index] = new
        node.args = tuple(args)
    return spoiled


def swap(node: fx.Node, i: int, j: int) -> int:
    """Exchange two arguments of a node."""
    args = list(node.args)
    args[i], args[j] = args[j], args[i]
    node.args = tuple(args)
    return int(args[i] is not args[j])


def drop(node: fx.Node, kept: Any) -> int:
    """Use an operand instead of what is computed of it."""
    node.replace_all_uses_with(kept)
    return 1


def rebuild(context: PassContext, suffix: str, change: Callable[..., Any]) -> int:
    """Let the recipes of the weights named *suffix* compute change(weight)."""
    if context.region:
        return 0  # once for all layers, with the outer graph
    weights = context.module.weights
    names = [n for n in weights if n.endswith(suffix)]
    for name in names:
        weights[name] = Recipe.compose(change, [weights[name]])
    return len(names)


def input_named(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in placeholders(graph) if n.name.endswith(name))


def behind(
    graph: fx.Graph, context: PassContext, node: fx.Node, target: Any, *arguments: Any
) -> int:
    """Let everybody who reads a value read what an operator makes of it."""
    with graph.inserting_after(node):
        new = context.call(graph, target, node, *arguments, source=list(node.users))
    node.replace_all_uses_with(new, lambda user: user is not new)
    return 1
