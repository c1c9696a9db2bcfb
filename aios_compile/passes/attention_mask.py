"""Find out what an attention mask is by running it and comparing it with the masks that we know.

A mask is written in too many ways to match its graph: comparisons of positions, triangles of ones,
minus infinity or the smallest float, tables of the whole context. Its values are few: causal,
causal within a window, causal within a chunk; a bias that falls with the distance may be added
(ALiBi: Press et al., 2021). It is run at two sizes that go beyond every constant
in it (or to the end of its table), so that a window shows, and anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from aios_compile.ir.counted_tokens import ARANGES, counted_from
from aios_compile.passes.concrete import Concrete, Unknown, ancestors
from aios_compile.passes.context import PassContext
from aios_compile.passes.match import aten, is_call

HIDDEN = -1e4  # an additive mask at most this hides a key: its weight is zero in float32
LINEAR = 1e-6  # of a bias's largest value: a few roundings in float32
LARGEST = 4608  # tokens up to which a mask over all keys is run; 170 MB an intermediate


class Mask(NamedTuple):
    """Causal attention, within a window or a chunk of so many tokens where given.

    alibi: for each head the slope of a bias slope * (key - query) that is added to the scores.
    """

    window: int | None = None
    chunk: int | None = None
    alibi: tuple[float, ...] | None = None


class MaskNode(NamedTuple):
    """A value of the graph that masks scores: kind "visible", "hidden" (bool) or "additive".

    hidden: an additive mask at most this hides a key. factor: what the sum is multiplied by later.
    """

    node: fx.Node
    kind: str
    hidden: float = HIDDEN
    factor: float = 1.0


def find_mask(masks: Sequence[MaskNode], context: PassContext, num_heads: int) -> Mask | str:
    """Return the mask that all `masks` make together, or the reason why it is none of ours."""
    nodes = [n for mask in masks for n in ancestors(mask.node, context)]
    constants = sorted(set(_constants(nodes)))
    calls = len(context.module.calls(context.region)) if context.region else 1
    counters = [n for n in nodes if _is_token_index(n, context)]
    samples = _positions(nodes, counters, constants, context)
    if isinstance(samples, str):
        return samples
    found: list[Mask | str] = []
    try:
        for call in range(calls if _differs_by_call(nodes, context) else 1):
            for positions in samples:
                given = {n: positions.to(n.meta["val"].dtype) for n in counters}
                values = Concrete(context, positions, given, call=call)
                seen = _masked(masks, values, num_heads)
                found.append(seen if isinstance(seen, str) else _known(*seen, positions, constants))
    except Unknown as unknown:
        return f"the attention mask depends on {unknown}"
    reasons = [f for f in found if isinstance(f, str)]
    if reasons:
        return reasons[0]
    masks_found = [f for f in found if isinstance(f, Mask)]
    if all(_same(mask, masks_found[-1]) for mask in masks_found):
        return masks_found[-1]
    return "the attention mask changes with the token count, or from layer to layer"


def _same(a: Mask, b: Mask) -> bool:
    """Return whether two masks are equal but for the rounding of their slopes."""
    if a.alibi is None or b.alibi is None:
        return a == b
    near = torch.allclose(torch.tensor(a.alibi), torch.tensor(b.alibi), rtol=1e-4, atol=0)
    return a._replace(alibi=None) == b._replace(alibi=None) and near


def _constants(nodes: Iterable[fx.Node]) -> Iterable[float]:
    """Yield the numbers that a mask may compare with; whole floats too, which often only fill."""
    for node in nodes:
        values: tuple[Any, ...] = (*node.args, *node.kwargs.values())
        for value in values:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and 1 < abs(value) < 2**20 and value == int(value):
                yield abs(value)


def _differs_by_call(nodes: Iterable[fx.Node], context: PassContext) -> bool:
    """Return whether the mask reads an input that the region's calls bind to different values."""
    if not context.region:
        return False
    graph = context.graph_module.graph
    calls = context.module.calls(context.region)
    holders = list(graph.find_nodes(op="placeholder"))
    used = [holders.index(n) for n in nodes if n.op == "placeholder" and n.graph is graph]
    return any(len({call.args[i] for call in calls}) > 1 for i in used)


def _is_token_index(node: fx.Node, context: PassContext) -> bool:
    """Return whether a node is arange(T): of a whole sequence, the same as its positions."""
    return node.target in ARANGES and counted_from(node, context.module.mode) == 0


def _positions(
    nodes: Sequence[fx.Node],
    counters: Sequence[fx.Node],
    constants: Sequence[float],
    context: PassContext,
) -> list[Tensor] | str:
    """Return two position vectors that reach beyond every constant, or to the end of a table.

    A mask of positions only is sampled around the constants; one that counts tokens in another way
    is run in full.
    """
    table = min((s for n in nodes for s in _table_sizes(n, context)), default=None)
    if table is not None:
        if table > LARGEST:
            return f"the attention mask comes from a table of {table} tokens, too large to be run"
        return [torch.arange(max(1, table - 7)), torch.arange(table)]
    inside = set(nodes)
    counts = any(
        isinstance(n.meta.get("val"), torch.SymInt) and set(n.users) & inside - set(counters)
        for n in nodes
    )
    if counts or any(n.target in ARANGES and n not in counters for n in nodes):
        largest = max((c for c in constants if isinstance(c, int)), default=8)
        if largest > LARGEST:
            return f"the attention mask compares token counts with {largest}, too large to be run"
        return [torch.arange(largest + 5), torch.arange(largest + 12)]
    near = {m * int(c) + d for c in constants for m in (1, 2) for d in (-1, 0, 1)}
    return [torch.tensor(sorted(near | set(range(count)))) for count in (9, 14)]


def _table_sizes(node: fx.Node, context: PassContext) -> list[int]:
    """Return the tokens that a table of keys (a stored triangle, a row of biases) was made for."""
    value = node.meta.get("val")
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    if is_call(node, aten.slice.Tensor):  # the last T columns of a table, or the first
        source: Any = node.args[0]
        before = source.meta["val"].shape
        return [b for b, s in zip(before, shape) if isinstance(b, int) and not isinstance(s, int)]
    fixed = len(shape) > 1 and all(isinstance(s, int) for s in shape)  # [T, H, D] holds no table
    square = fixed and shape[-1] == shape[-2] and shape[-1] > 1
    return [int(shape[-1])] if square and node.op == "placeholder" else []


def _masked(
    masks: Sequence[MaskNode], values: Concrete, num_heads: int
) -> tuple[Tensor, Tensor | None] | str:
    """Return which keys are seen, bool [T, T], and what is added to each head's scores, [H, T, T].

    The bias is None where nothing but minus infinity is added. A reason where it is not one mask
    for all heads.
    """
    count = len(values.positions)
    seen = torch.ones(1, count, count, dtype=torch.bool)
    bias = torch.zeros(1, count, count, dtype=torch.float64)
    for mask in masks:
        value = values.value(mask.node)
        if value.dim() < 2 or any(s not in (1, count) for s in value.shape[-2:]):
            return "the attention mask is no matrix of queries and keys"
        value = value.expand(*value.shape[:-2], count, count).reshape(-1, count, count)
        if len(value) not in (1, num_heads):
            return "the attention mask is no matrix of queries and keys for each head"
        if mask.kind == "additive":
            visible = value > mask.hidden
            bias = bias + torch.where(visible, value.double() * mask.factor, 0.0)
        else:
            visible = value if mask.kind == "visible" else ~value
        seen = seen & visible
    if not bool((seen == seen[:1]).all()):
        return "the attention mask differs between heads"
    bias = torch.where(seen, bias, 0.0)
    return seen[0], bias.expand(num_heads, -1, -1) if bool(bias.any()) else None


def _known(
    seen: Tensor, bias: Tensor | None, positions: Tensor, constants: Sequence[float]
) -> Mask | str:
    mask = _known_shape(seen, positions, constants)
    if bias is None or isinstance(mask, str):
        return mask
    slopes = _slopes(seen, bias, positions)
    if slopes is None:
        return "the attention mask adds a bias that does not fall with the distance alone"
    return mask._replace(alibi=slopes)


def _slopes(seen: Tensor, bias: Tensor, positions: Tensor) -> tuple[float, ...] | None:
    """Return slopes with bias = slope * (key - query) + anything a query, on what is seen; or None.

    What is the same for all keys of a query leaves its softmax as it is.
    """
    relative = bias - bias.diagonal(dim1=-2, dim2=-1)[:, :, None]
    distance = (positions[None] - positions[:, None]).double()
    far = torch.where(seen, -distance, -1.0)
    place = int(far.flatten().argmax())
    slopes = relative.flatten(1)[:, place] / distance.flatten()[place]
    error = torch.where(seen, relative - slopes[:, None, None] * distance, 0.0).abs().amax((1, 2))
    if bool((error > LINEAR * bias.abs().amax((1, 2))).any()):
        return None
    return tuple(slopes.float().tolist())


def _known_shape(seen: Tensor, positions: Tensor, constants: Sequence[float]) -> Mask | str:
    distance = positions[:, None] - positions[None]
    causal = distance >= 0
    if bool((seen & ~causal).any()):
        return "the attention mask lets tokens see later ones"
    if torch.equal(seen, causal):
        return Mask()
    window = int(distance[seen].max()) + 1 if bool(seen.any()) else 0
    if torch.equal(seen, causal & (distance < window)):
        return Mask(window=window)
    for chunk in map(int, constants):
        same = positions[:, None] // chunk == positions[None] // chunk
        if torch.equal(seen, causal & same):
            return Mask(chunk=chunk)
    return "the attention mask is neither causal nor a causal window or chunk"
