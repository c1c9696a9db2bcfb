"""Windows and chunks of attention that reach beyond a certificate's few tokens.

Once attention is an op, its window is a number that passes carry along: a certificate may replace
each large number by a small one, in the program before and in the program after alike. What a pass
altered by one is then not replaced, and shows. While the window is still spelled out (before
raise_attention), the sample grows past it instead, as far as that is cheap; else the pass that
raises it is proven with the number replaced where it is compared with, too. A window that only the
program after has is made small there: it must not have one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from aios_compile.ir import inputs, ops, snapshot
from aios_compile.ir.counted_tokens import slice_of
from aios_compile.ir.module import IRModule, depends_on, placeholders

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
LOOK_UPS = (aten.slice.Tensor, aten.embedding.default, aten.index_select.default, aten.index.Tensor)
# Products and sums that a longer sample may cost: half a second on one core.
AFFORDABLE = 4e9
CHEAP = 2e8  # a few milliseconds, as long as the nodes of a small layer take by themselves
BEHIND_64 = 67  # tokens: several pages, and more than any tile of rows
LONGEST = 8 * inputs.PAGE_SIZE  # tokens: what the smallest page table holds


@dataclass
class Smaller:
    """Numbers that stand for larger ones: for bounds of attention ops, and where bounds are still
    compared with (`spelled`)."""

    bounds: dict[int, int] = field(default_factory=dict)
    spelled: dict[int, int] = field(default_factory=dict)


def shrunk(module: IRModule, smaller: Smaller) -> IRModule:
    """Return a copy of a program with bounds replaced; the program if there are none.

    Nodes are copied, weights are not.
    """
    if not smaller.spelled and not bounds(module) & set(smaller.bounds):
        return module
    copy = snapshot.take(module)
    for node in _attentions(copy):
        args = list(node.args)
        for position in BOUNDS[node.target]:  # type: ignore[index]
            if len(args) > position and isinstance(bound := args[position], int):
                args[position] = smaller.bounds.get(bound, bound)
        node.args = tuple(args)
    for node in _comparisons(copy):
        node.args = tuple(smaller.spelled.get(a, a) if type(a) is int else a for a in node.args)
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


def smaller_bounds(module: IRModule, raised: set[int] | frozenset[int] = frozenset()) -> Smaller:
    """Choose a small number for each bound of a program that its samples would not reach.

    raised: bounds that the program after has besides (see `unseen`). What the program compares
    with, up to one beside such a bound, becomes as small; a bound that is none of its numbers
    becomes small in the program after only. One that the program has elsewhere stays as it is.
    """
    known = bounds(module)
    free = iter(s for s in SMALL if s not in known)
    smaller = Smaller(dict(zip(sorted(b for b in known if b > SEEN), free)))
    compared, every = _spelled(module), _numbers(module)
    for bound in sorted(raised):
        near = [c for c in compared if abs(c - bound) <= 1]
        if near or not {bound - 1, bound, bound + 1} & every:
            small = next(free, None)
            if small is not None:
                smaller.bounds[bound] = small
                smaller.spelled.update({c: small + c - bound for c in near})
    return smaller


def unseen(before: IRModule, after: IRModule, tokens: int) -> set[int]:
    """Return bounds that only the program after has, and that samples of `tokens` do not pass."""
    return {b for b in bounds(after) - bounds(before) if b > SEEN and b >= tokens}


def samples(module: IRModule, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Return the numbers of tokens of a program's samples: the last ones beyond 64 where layers are
    small, and past the largest affordable bound that is spelled out."""
    limit = module.length_limit
    fits = limit.num_tokens >= BEHIND_64 if limit is not None else not _has_short_table(module)
    if fits and tokens[-1] < BEHIND_64 and affords(module, BEHIND_64, CHEAP):
        tokens = (*tokens[:-1], BEHIND_64)
    return (*tokens, *(t for t in _longer_samples(module) if t > tokens[-1]))


def _has_short_table(module: IRModule) -> bool:
    """Return whether a table that is cut to the tokens, or looked up by position, ends before."""
    positions = {n for n, source in module.inputs.items() if source == "positions"}
    for name, graph_module in module.graphs().items():
        holders = placeholders(graph_module.graph)
        bound = module.calls(name)[0].args if name else holders
        given = [h for h, a in zip(holders, bound) if getattr(a, "name", "") in positions]
        for node in graph_module.graph.nodes:
            if node.target not in LOOK_UPS:
                continue
            cut = node.target is aten.slice.Tensor
            dim = slice_of(node)[0] if cut else 0
            rows, left = (x.meta["val"].shape[dim] for x in (node.args[0], node))
            counts = cut or any(depends_on(node, holder) for holder in given)
            if counts and not isinstance(left, int) and isinstance(rows, int) and rows < BEHIND_64:
                return True
    return False


def _longer_samples(module: IRModule) -> tuple[int, ...]:
    if bounds(module):
        return ()
    spelled = {c + 3 for c in _spelled(module)}
    return tuple(sorted(t for t in spelled if t <= LONGEST and affords(module, t)))[-1:]


def affords(module: IRModule, tokens: int, operations: float = AFFORDABLE) -> bool:
    """Return whether a sample of so many tokens costs little enough."""
    return tokens * _cost_of_a_token(module) <= operations


def _spelled(module: IRModule) -> set[int]:
    """Return the numbers beyond the samples that a program compares something with."""
    found = {a for node in _comparisons(module) for a in node.args if type(a) is int}
    return {a for a in found if SEEN < a < 2**20}


def _numbers(module: IRModule) -> set[object]:
    """Return every number that is an argument in a program."""
    nodes = [n for graph_module in module.graphs().values() for n in graph_module.graph.nodes]
    return {a for n in nodes for a in (*n.args, *n.kwargs.values()) if isinstance(a, (int, float))}


def _comparisons(module: IRModule) -> Iterator[fx.Node]:
    for graph_module in module.graphs().values():
        yield from (n for n in graph_module.graph.nodes if n.target in COMPARISONS)


def _attentions(module: IRModule) -> Iterator[fx.Node]:
    yield from (n for n in module.nodes() if n.op == "call_function" and n.target in BOUNDS)


def _cost_of_a_token(module: IRModule) -> int:
    """Estimate the products a token of one layer of each kind: the elements of its weights."""
    total = 1
    for region, graph_module in module.graphs().items():
        for node in placeholders(graph_module.graph):
            value = node.meta["val"]
            if region and value.dim() == 2 and all(isinstance(s, int) for s in value.shape):
                total += math.prod(value.shape)
    return total
