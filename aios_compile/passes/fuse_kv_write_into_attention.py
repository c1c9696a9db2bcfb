"""Finish queries and keys, write keys and values, and attend to them in one kernel.

Saves a launch a layer, and one write and read of q. Each Triton program writes the new keys of the
part of the sequence that it attends to, and finishes the queries that it attends with. Not
for the C++ target, which shares keys out by head and has a barrier between the two phases anyway.
"""

from __future__ import annotations

from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.fusion import fuse_nodes, is_convex
from aios_compile.ir.refresh import refresh_layouts
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fuse_qk_norm_rope_kv_write import WRITES, Match, match_write
from aios_compile.passes.fusion_groups import getitems, is_call, kernel_name
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.head_views import sink_views


def _group(match: Match) -> list[fx.Node] | Refusal:
    """Return what becomes one kernel: the heads' norms and ropes, the write, the attention."""
    group = [*match.nodes, match.write, *getitems(match.write), match.attention]
    if not is_convex(group):
        line = provenance.place(match.attention)
        return Refusal("the attention depends on another reader of the written cache", line)
    order = {n: i for i, n in enumerate(match.write.graph.nodes)}
    return sorted(group, key=order.__getitem__)


@graph_pass(numerics="exact", target="triton")
def fuse_kv_write_into_attention(graph: fx.Graph, context: PassContext) -> int:
    """Fuse a kv_write with the attention that reads it, and with the norms and ropes of the heads.

    Before::

        def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]",
              cos: "f32[T, 16]", sin: "f32[T, 16]",
              k_cache: "state f32[64, 2, 16, 16]", v_cache: "state f32[64, 2, 16, 16]",
              slots: "input i64[T]", query_starts: "input i64[S+1]",
              context_lengths: "input i64[S]", page_tables: "input i64[S, 8]"):
            q2 = aios.rope.default(q, cos, sin, False)
            k2 = aios.rope.default(k, cos, sin, False)
            caches = aios.kv_write.default(k2, v, k_cache, v_cache, slots)
            new_k, new_v = caches[0], caches[1]
            out = aios.paged_attention.default(
                q2, new_k, new_v, query_starts, context_lengths, page_tables, 0.25)
            return out, new_k, new_v

    After::

        def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]",
              cos: "f32[T, 16]", sin: "f32[T, 16]",
              k_cache: "state f32[64, 2, 16, 16]", v_cache: "state f32[64, 2, 16, 16]",
              slots: "input i64[T]", query_starts: "input i64[S+1]",
              context_lengths: "input i64[S]", page_tables: "input i64[S, 8]"):
            @kernel("kv_write_attention")
            def rope_kv_write_paged_attention(
                    q, cos, sin, k, v, k_cache, v_cache, slots,
                    query_starts, context_lengths, page_tables):
                q2 = aios.rope.default(q, cos, sin, False)
                k2 = aios.rope.default(k, cos, sin, False)
                caches = aios.kv_write.default(k2, v, k_cache, v_cache, slots)
                out = aios.paged_attention.default(
                    q2, caches[0], caches[1], query_starts, context_lengths, page_tables, 0.25)
                return caches[0], caches[1], out

            new_k, new_v, out = rope_kv_write_paged_attention(
                q, cos, sin, k, v, k_cache, v_cache, slots,
                query_starts, context_lengths, page_tables)
            return out, new_k, new_v
    """
    hits = 0
    for write in [n for n in graph.nodes if is_call(n, *WRITES)]:
        sink_views(graph, write, context)
        refresh_layouts(context.module, graph)
        match = match_write(write, context)
        group = match if isinstance(match, Refusal) else _group(match)
        if isinstance(group, Refusal):
            context.refuse(group)
            continue
        fuse_nodes(graph, group, kernel_name(group), "kv_write_attention")
        hits += 1
    return hits
