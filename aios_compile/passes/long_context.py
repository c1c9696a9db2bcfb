"""Windows and chunks of attention that reach beyond a certificate's few tokens.

Once attention is an op, its window is a number that passes carry along: a certificate may replace
each large number by a small one, in the program before and in the program after alike. What a pass
altered by one is then not replaced, and shows. While the window is still spelled out (before
raise_attention), the sample grows past it instead, as far as that is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from aios_compile.ir import inputs, ops, snapshot
from aios_compile.ir.module import IRModule, body_of, is_kernel_call, placeholders

assert ops.TABLE, "the op table registers the aios operators"
aten, aios = torch.ops.aten, torch.ops.aios
# Positions of window and chunk among the arguments.
BOUNDS = {aios.attention.default: (4, 6), aios.paged_attention.default: (7, 9)}
SEEN = 11  # a bound up to this hides keys in the samples of 19 tokens
SMALL = (7, 9, 5, 11, 6, 8, 10)  # what large bounds become, in this order
COMPARISONS = frozenset(
    {
        *(aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.sub.Tensor),
        *(aten.add.Tensor, aten.floor_divide.default, aten.div.Tensor_mode),
    }
)
# Products and sums that a longer sample may cost: half a second on one core.
AFFORDABLE = 4e9
LONGEST = 8 * inputs.PAGE_SIZE  # tokens: what the smallest page table holds


def shrunk(module: IRModule, smaller: Mapping[int, int]) -> IRModule:
    """Return a copy of a program with bounds of attention replaced; the program if there are none.

    Nodes are copied, weights are not.
    """
    if not smaller or not bounds(module) & set(smaller):
        return module
    copy = snapshot.take(module)
    for node in _attentions(copy):
        args = list(node.args)
        for position in BOUNDS[node.target]:  # type: ignore[index]
            if len(args) > position and args[position] in smaller:
                args[position] = smaller[args[position]]  # type: ignore[index]
        node.args = tuple(args)
    return copy


def bounds(module: IRModule) -> set[int]:
    """Return every window and chunk of the attentions of a program."""
    found = set()
    for node in _attentions(module):
        for position in BOUNDS[node.target]:  # type: ignore[index]
            value = node.args[position] if len(node.args) > position else None
            if isinstance(value, int):
                found.add(value)
    return found


def smaller_bounds(module: IRModule) -> dict[int, int]:
    """Choose a small number for each bound of a program that its samples would not reach."""
    known = bounds(module)
    free = [s for s in SMALL if s not in known]
    return dict(zip(sorted(b for b in known if b > SEEN), free))


def longer_samples(module: IRModule) -> tuple[int, ...]:
    """Return numbers of tokens that pass the largest affordable bound which is spelled out."""
    if bounds(module):
        return ()
    spelled = {
        a + 3
        for graph_module in module.graphs().values()
        for node in graph_module.graph.nodes
        if node.target in COMPARISONS
        for a in node.args
        if isinstance(a, int) and not isinstance(a, bool) and SEEN < a < 2**20
    }
    cost = _cost_of_a_token(module)
    return tuple(sorted(t for t in spelled if t <= LONGEST and t * cost <= AFFORDABLE))[-1:]


def _attentions(module: IRModule) -> Iterator[fx.Node]:
    for graph_module in module.graphs().values():
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and node.target in BOUNDS:
                yield node
            elif is_kernel_call(node):
                inner = body_of(node).graph.nodes
                yield from (n for n in inner if n.op == "call_function" and n.target in BOUNDS)


def _cost_of_a_token(module: IRModule) -> int:
    """Estimate the products a token of one layer of each kind: the elements of its weights."""
    total = 1
    for region, graph_module in module.graphs().items():
        for node in placeholders(graph_module.graph):
            value = node.meta["val"]
            if region and value.dim() == 2 and all(isinstance(s, int) for s in value.shape):
                total += math.prod(value.shape)
    return total
