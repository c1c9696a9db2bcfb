"""Normalise and rotate queries and keys and write keys and values to their pages in one kernel.

Pays up to four launches a layer and one write and read of k and v: each head row is read once from
the merged projection, and the rotated key goes straight to its page.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from aios_compile.ir import ops, provenance
from aios_compile.ir.fusion import fuse_nodes, is_convex
from aios_compile.ir.refresh import refresh_layouts
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fusion_groups import (
    getitems,
    is_call,
    kernel_name,
    through_views,
)
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.head_views import distances_vary, sink_views

assert ops.TABLE, "the op table registers the aios operators"
aios = torch.ops.aios
WRITES = (aios.kv_write.default, aios.quantized_kv_write.default)


class Chain(NamedTuple):
    """What is done to the rows of q or k: the nodes in order, and the rope among them."""

    nodes: list[fx.Node]
    rope: fx.Node | None


class Match(NamedTuple):
    """`nodes`: what is done to the heads of q and k; none where they are read as they are."""

    nodes: list[fx.Node]
    q: fx.Node
    write: fx.Node
    attention: fx.Node


def match_write(write: fx.Node, context: PassContext) -> Match | Refusal:
    """Match a kv_write, the attention that alone reads what it writes, and norms and ropes."""
    line = provenance.place(write)
    readers = {u for item in getitems(write) for u in item.users}
    attentions = [u for u in readers if is_call(u, aios.paged_attention.default)]
    if len(attentions) != 1:
        return Refusal(f"{len(attentions)} attentions read what is written", line)
    q, k = attentions[0].args[0], write.args[0]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
    chains = [_chain(q), _chain(k)]
    for chain in chains:
        if isinstance(chain, Refusal):
            return chain
    ropes = [c.rope for c in chains if isinstance(c, Chain) and c.rope is not None]
    nodes = [n for c in chains if isinstance(c, Chain) for n in c.nodes]
    if len(ropes) == 2 and ropes[0].args[1:] != ropes[1].args[1:]:
        return Refusal("queries and keys are rotated by different tables", line)
    group = [*nodes, write, *getitems(write)]
    if not is_convex(group):
        return Refusal("the queries depend on the written cache", line)
    heads = [q, k, write.args[1], *(n.args[0] for n in nodes)]
    outside = [n for n in heads if isinstance(n, fx.Node) and n not in nodes]
    if context.options.target == "triton" and any(map(distances_vary, outside)):
        return Refusal("heads lie at distances that depend on the number of tokens", line)
    return Match(nodes, q, write, attentions[0])


def _chain(end: fx.Node) -> Chain | Refusal:
    """Return the norm and rope that make `end`, both optional; they must be used here only."""
    nodes, rope, node = list[fx.Node](), None, end
    behind = through_views(end)
    if behind is not end and is_call(behind, aios.rope.default, aios.rms_norm.default):
        reason = f"heads are rearranged behind {kernel_name([behind])}"
        return Refusal(reason, provenance.place(behind))
    if is_call(node, aios.rope.default):
        rope = node
        nodes.append(node)
        node = node.args[0]  # type: ignore[assignment]
    if is_call(node, aios.rms_norm.default):
        nodes.append(node)
    for inner in nodes:
        if len(inner.users) > 1:
            reason = f"{kernel_name([inner])} has another user"
            return Refusal(reason, provenance.place(inner))
    return Chain(nodes[::-1], rope)


@graph_pass(numerics="exact")
def fuse_qk_norm_rope_kv_write(graph: fx.Graph, context: PassContext) -> int:
    """Fuse what is done to the heads of q and k with the write of k and v to the cache.

    Before::

        def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]",
              cos: "f32[T, 16]", sin: "f32[T, 16]",
              qn: "weight f32[16]", kn: "weight f32[16]",
              k_cache: "state f32[64, 2, 16, 16]", v_cache: "state f32[64, 2, 16, 16]",
              slots: "input i64[T]", query_starts: "input i64[S+1]",
              context_lengths: "input i64[S]", page_tables: "input i64[S, 8]"):
            q2 = aios.rope.default(aios.rms_norm.default(q, qn, 1e-6, True), cos, sin, False)
            k2 = aios.rope.default(aios.rms_norm.default(k, kn, 1e-6, True), cos, sin, False)
            caches = aios.kv_write.default(k2, v, k_cache, v_cache, slots)
            new_k, new_v = caches[0], caches[1]
            out = aios.paged_attention.default(
                q2, new_k, new_v, query_starts, context_lengths, page_tables, 0.25)
            return out, new_k, new_v

    After::

        def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]",
              cos: "f32[T, 16]", sin: "f32[T, 16]",
              qn: "weight f32[16]", kn: "weight f32[16]",
              k_cache: "state f32[64, 2, 16, 16]", v_cache: "state f32[64, 2, 16, 16]",
              slots: "input i64[T]", query_starts: "input i64[S+1]",
              context_lengths: "input i64[S]", page_tables: "input i64[S, 8]"):
            @kernel("qk_norm_rope_kv_write")
            def qk_norm_rope_kv_write(q, qn, cos, sin, k, kn, v, k_cache, v_cache, slots):
                q2 = aios.rope.default(aios.rms_norm.default(q, qn, 1e-6, True), cos, sin, False)
                k2 = aios.rope.default(aios.rms_norm.default(k, kn, 1e-6, True), cos, sin, False)
                caches = aios.kv_write.default(k2, v, k_cache, v_cache, slots)
                return q2, caches[0], caches[1]

            q2, new_k, new_v = qk_norm_rope_kv_write(
                q, qn, cos, sin, k, kn, v, k_cache, v_cache, slots)
            out = aios.paged_attention.default(
                q2, new_k, new_v, query_starts, context_lengths, page_tables, 0.25)
            return out, new_k, new_v
    """
    hits = 0
    for write in [n for n in graph.nodes if is_call(n, *WRITES)]:
        sink_views(graph, write, context)
        refresh_layouts(context.module, graph)
        match = match_write(write, context)
        if isinstance(match, Refusal):
            context.refuse(match)
        elif match.nodes:
            _rewrite(graph, match)
            hits += 1
    return hits


def _rewrite(graph: fx.Graph, match: Match) -> None:
    """Fuse with the results in the order q, then the caches and their scales."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    items = sorted(getitems(match.write), key=lambda n: int(n.args[1]))  # type: ignore[arg-type]
    anchor = match.write
    nodes = [*match.nodes, match.write, *items]
    if match.q in nodes and order[match.q] > order[anchor]:
        match.q.append(match.write)
    for item in items:
        anchor.append(item)
        anchor = item
    parts = [n for n in nodes if is_call(n, aios.rms_norm.default)]
    turned = [n for n in nodes if is_call(n, aios.rope.default)]
    name = ["qk_norm"] * bool(parts) + (["rope"] if parts else ["qk_rope"]) * bool(turned)
    fuse_nodes(graph, nodes, "_".join([*name, "kv_write"]), "qk_norm_rope_kv_write")
