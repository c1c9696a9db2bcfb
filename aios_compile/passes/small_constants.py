"""Enlarge epsilons while a pass is proven, alike in the programs before and after it.

An epsilon of 1e-6 is added to a mean square of about 1. If a pass made it ten times too large, the
result would change by less than eight roundings allow, and the mistake would pass. So all epsilons
are multiplied by one factor, in both programs, which makes them a hundredth of that mean: then even
an epsilon that is twice too large shows. One factor for all keeps their ratios, so a pass may still
turn sum + n * eps into mean + eps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.ir.module import IRModule, body_of, is_kernel_call, placeholders

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add.Scalar)
SMALL = 1e-3  # epsilons of norms and denominators are below
LARGE = 1e-2  # what the largest of them becomes


class _Site(NamedTuple):
    node: fx.Node
    position: int
    value: float


def factor_of(module: IRModule) -> float:
    """Return what makes the largest epsilon of a program visible; 1 where it has none."""
    largest = max((site.value for site in _sites(module)), default=LARGE)
    return LARGE / largest


@contextlib.contextmanager
def enlarged(module: IRModule, factor: float) -> Iterator[None]:
    """Multiply the epsilons of a program for a while."""
    sites = list(_sites(module)) if factor != 1 else []
    for node, position, value in sites:
        node.update_arg(position, value * factor)
    try:
        yield
    finally:
        for node, position, value in sites:
            node.update_arg(position, value)


def _sites(module: IRModule) -> Iterator[_Site]:
    """Find each small constant that is added to an activation, or is a norm's epsilon."""
    for region, graph_module in module.graphs().items():
        fixed = _fixed(module, region, graph_module.graph)
        for node in graph_module.graph.nodes:
            if is_kernel_call(node):
                yield from (s for n in body_of(node).graph.nodes if (s := _site(n)))
            elif node not in fixed and (site := _site(node)):
                yield site


def _site(node: fx.Node) -> _Site | None:
    position = _position(node.target) if node.op == "call_function" else -1
    value = node.args[position] if 0 <= position < len(node.args) else None
    small = isinstance(value, float) and 0 < value < SMALL
    return _Site(node, position, value) if small and isinstance(value, float) else None


@functools.cache
def _position(target: Any) -> int:
    """Return which argument of an operator is an epsilon, or -1."""
    if target in ADDITIONS:
        return 1
    schema = getattr(target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    return names.index("eps") if "eps" in names else -1


def _fixed(module: IRModule, region: str, graph: fx.Graph) -> set[fx.Node]:
    """Return what is computed of weights alone: fold_constants moves it out of the graph."""
    holders = placeholders(graph)
    bound = [call.args for call in module.calls(region)] if region else [tuple(holders)]
    found = {
        holder
        for i, holder in enumerate(holders)
        if all(getattr(args[i], "name", "") in module.weights for args in bound)
    }
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and all(n in found for n in inputs):
            found.add(node)
    return found
