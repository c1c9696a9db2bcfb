"""Recognise causal attention as aios.attention on q[T, H, D], k[T, G, D], v[T, G, Dv].

Called or spelled out, attention is the one place where tokens mix; as one op its keys and values
can be paged and no [T, T] matrix is ever stored. Key heads that were repeated for their query heads
are read once, and the mask becomes a few numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.passes.attention_mask import Mask, find_mask
from aios_compile.passes.attention_spellings import Attention, called, spelled
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import dtype_of, shape_of
from aios_compile.passes.rearrange import Source, emit, source_of

aten = torch.ops.aten
aios = torch.ops.aios


class Match(NamedTuple):
    """An attention whose mask is known and whose operands can be brought to [T, heads, width]."""

    attention: Attention
    mask: Mask
    q: Source
    k: Source
    v: Source


@graph_pass(numerics="reassociates", required=True)
def raise_attention(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite scaled_dot_product_attention, or its parts, as aios.attention.

    What the mask is, and how heads were repeated, is found out by running those parts of the graph.
    A bias that falls with the distance (ALiBi) becomes a slope a head; any other bias, or a mask
    that is not causal, is refused with the model's line.

    Before::

        def f(q: "f32[T, 4, 64]", k: "f32[T, 2, 64]", v: "f32[T, 2, 64]"):
            q = aten.permute.default(q, [1, 0, 2])
            k = aten.permute.default(k, [1, 0, 2])
            v = aten.permute.default(v, [1, 0, 2])
            return aios.sdpa.default(q, k, v, None, True, None, True)

    After::

        def f(q: "f32[T, 4, 64]", k: "f32[T, 2, 64]", v: "f32[T, 2, 64]"):
            out = aios.attention.default(q, k, v, 0.125, None, None, None, None)
            return aten.permute.default(out, [1, 0, 2])
    """
    hits = 0
    for node in list(graph.nodes):
        if not node.users:
            continue
        found = _match(node, context)
        if isinstance(found, Match):
            _rewrite(graph, node, found, context)
            hits += 1
        elif isinstance(found, str):
            context.refuse(Refusal(found, provenance.place(node)))
    return hits


def _match(node: fx.Node, context: PassContext) -> Match | str | None:
    attention = called(node) or spelled(node, context)
    if not isinstance(attention, Attention):
        return attention
    q, k, v = attention.q, attention.k, attention.v
    token, head, width = (shape_of(q.node)[d] for d in q.dims)
    if not isinstance(token, str) or not isinstance(head, int) or not isinstance(width, int):
        return "attention over something else than the tokens of one sequence"
    if any(shape_of(x.node)[x.dims[0]] != token for x in (k, v)):
        return "attention between two sequences"
    mask: Mask | str = Mask()
    if attention.masks:
        mask = find_mask(attention.masks, context, head)
    elif not attention.is_causal:
        return "attention without a mask lets tokens see later ones"
    if isinstance(mask, str):
        return mask
    if mask.alibi is not None and attention.sinks is not None:
        return "attention with both sinks and a bias that falls with the distance"
    sources = [source_of(x.node, x.dims, context) for x in (q, k, v)]
    if any(s is None for s in sources):
        return "attention on a batch of sequences"
    found = Match(attention, mask, *sources)  # type: ignore[arg-type]
    if found.q.groups != head:
        return "attention whose query heads are repeated"
    if found.k.groups != found.v.groups:  # one was repeated before it was rotated
        near = [source_of(x.node, x.dims, context, far=False) for x in (k, v)]
        found = found._replace(k=near[0] or found.k, v=near[1] or found.v)
    groups = max(found.k.groups, found.v.groups)
    if found.k.groups == found.v.groups and head % groups == 0:
        return found
    return "attention whose keys and values have different heads"


def _rewrite(graph: fx.Graph, root: fx.Node, match: Match, context: PassContext) -> None:
    attention, mask = match.attention, match.mask
    with graph.inserting_before(root):
        operands = []
        for operand, source in zip((attention.q, attention.k, attention.v), match[2:]):
            width = shape_of(operand.node)[operand.dims[2]]
            assert isinstance(width, int)
            operands.append(emit(graph, source, width, context))
        new = context.call(
            graph,
            aios.attention.default,
            *operands,
            attention.scale,
            mask.window,
            attention.softcap,
            mask.chunk,
            attention.sinks,
            *([] if mask.alibi is None else [list(mask.alibi)]),
            source=[root],
        )
        new = context.call(graph, aten.permute.default, new, [1, 0, 2], source=[root])
        for _ in range(len(shape_of(root)) - 3):
            new = context.call(graph, aten.unsqueeze.default, new, 0, source=[root])
        if dtype_of(new) != dtype_of(root):
            dtype = dtype_of(root)
            new = context.call(graph, aten._to_copy.default, new, dtype=dtype, source=[root])
    root.replace_all_uses_with(new)
