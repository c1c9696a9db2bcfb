"""Find bounds that a pass has added and that no value of a sample would ever reach.

While a pass is proven, positions are below 128 and activations are about 1, so a wrong `clamp(x,
max=4096)` would change nothing. A correct rewrite only carries along numbers that the model already
has. So a bound that the program after the pass has, and the program before it has nowhere, is made
small in the program after: then it changes the result, unless it really never matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import fx

from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule
from aios_compile.passes.long_context import SEEN

aten = torch.ops.aten
LIMITS = frozenset(
    {
        *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
        *(aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.hardtanh.default),
    }
)
SMALL = 1  # what a bound of integers becomes
TINY = 2.0**-10  # what a bound of floats becomes: activations are about 1


def reached(after: IRModule, start: IRModule) -> IRModule:
    """Return a copy of a program with the bounds made small that `start` has nowhere.

    Returns the program itself where it has none.
    """
    if not _new(after, _numbers(start)):
        return after
    copy = snapshot.take(after)
    for node, position, small in _new(copy, _numbers(start)):
        node.update_arg(position, small)
    return copy


def _new(module: IRModule, known: set[object]) -> list[tuple[fx.Node, int, float]]:
    """Return each bound that is none of the known numbers: node, position, what it becomes."""
    return [
        (node, position, small)
        for node in module.nodes()
        if node.op == "call_function" and node.target in LIMITS
        for position, value in enumerate(node.args)
        if value not in known and (small := _small(node, value))
    ]


def _small(node: fx.Node, bound: object) -> float:
    """Return what an unreached bound becomes; 0 for one that samples pass, or that is no number."""
    if type(bound) not in (int, float) or not isinstance(bound, (int, float)):
        return 0
    if node.all_input_nodes[0].meta["val"].is_floating_point():
        return math.copysign(TINY, bound) if bound else 0
    return int(math.copysign(SMALL, bound)) if abs(bound) > SEEN else 0


def _numbers(module: IRModule) -> set[object]:
    """Return every number that is an argument in a program."""
    return {v for node in module.nodes() for v in _flat((*node.args, *node.kwargs.values()))}


def _flat(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif type(value) in (int, float):
            yield value
