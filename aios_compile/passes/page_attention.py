"""Keep keys and values in pages, so that a step computes its new tokens only.

Pays first of all: without it each token recomputes the whole prefix. A step's tokens form one flat
batch of many sequences; causality, windows and the page walk live in the one attention op. The
layout of the caches is chosen for the kernels: k_cache[N, G, D, page] holds 16 keys as one vector.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.symbols import new_size
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fusion_groups import shape_of
from aios_compile.passes.graph_pass import graph_pass

aios = torch.ops.aios


class Match(NamedTuple):
    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    settings: tuple[Any, ...]  # scale, window, softcap, chunk, sinks, alibi


def _match(node: fx.Node, context: PassContext) -> Match | Refusal:
    q, k, v, *settings = node.args
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    line = provenance.place(node)
    if any(x.meta["val"].dim() != 3 for x in (q, k, v)):
        return Refusal("attention over more than one sequence axis", line)
    tokens = new_size(context.module.mode, "T").node.expr
    if any(shape_of(x)[0] != tokens for x in (q, k, v)):
        return Refusal("attention whose keys or queries are not this step's tokens", line)
    return Match(node, q, k, v, tuple(settings))


@graph_pass(numerics="reassociates", required=True)
def page_attention(graph: fx.Graph, context: PassContext) -> int:
    """Replace attention over this step's keys by a write to and attention over a paged cache.

    Before::

        def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]"):
            return aios.attention.default(q, k, v, 0.25, None, None, None, None)

    After::

        def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]",
              slots: "input i64[T]", query_starts: "input i64[S+1]",
              context_lengths: "input i64[S]", page_tables: "input i64[S, 8]",
              k_cache: "state f32[64, 2, 16, 16]", v_cache: "state f32[64, 2, 16, 16]"):
            caches = aios.kv_write.default(k, v, k_cache, v_cache, slots)
            new_k, new_v = caches[0], caches[1]
            out = aios.paged_attention.default(
                q, new_k, new_v, query_starts, context_lengths, page_tables,
                0.25, None, None, None, None)
            return out, new_k, new_v
    """
    hits = 0
    for node in graph.find_nodes(op="call_function", target=aios.attention.default):
        match = _match(node, context)
        if isinstance(match, Refusal):
            context.refuse(match)
            continue
        _rewrite(graph, match, context)
        hits += 1
    return hits


def _rewrite(graph: fx.Graph, match: Match, context: PassContext) -> None:
    options = context.options
    long = torch.int64
    sequences = new_size(context.module.mode, "S")
    slots = context.add_input(graph, "slots", ("T",), long)
    starts = context.add_input(graph, "query_starts", (sequences + 1,), long)
    lengths = context.add_input(graph, "context_lengths", ("S",), long)
    width = options.max_pages_per_sequence
    tables = context.add_input(graph, "page_tables", ("S", width), long)
    _, heads, key_size = match.k.meta["val"].shape
    value_size = match.v.meta["val"].shape[-1]
    pages, page = options.num_pages, options.page_size
    k_shape, v_shape = (pages, heads, key_size, page), (pages, heads, page, value_size)
    k_cache = context.add_state(graph, "k_cache", k_shape, options.kv_dtype)
    v_cache = context.add_state(graph, "v_cache", v_shape, options.kv_dtype)
    source = [match.node]
    with graph.inserting_before(match.node):
        write = context.call(
            graph, aios.kv_write.default, match.k, match.v, k_cache, v_cache, slots, source=source
        )
        new_k = context.call(graph, operator.getitem, write, 0, source=source)
        new_v = context.call(graph, operator.getitem, write, 1, source=source)
        out = context.call(
            graph,
            aios.paged_attention.default,
            *(match.q, new_k, new_v, starts, lengths, tables, *match.settings),
            source=source,
            **match.node.kwargs,
        )
    match.node.replace_all_uses_with(out)
    graph.erase_node(match.node)
    context.set_next_state(graph, k_cache, new_k)
    context.set_next_state(graph, v_cache, new_v)
