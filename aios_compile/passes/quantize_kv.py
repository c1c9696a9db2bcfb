"""Keep the cached keys and values as 8-bit codes, with one scale for each token and head.

Pays in bytes: a token over a long context reads the whole cache of its sequence, and the cache
bounds how many sequences fit (Qwen3-0.6B, a token: 229,376 bytes in bf16, 118,272 so). A scale
for each token and head needs no calibration, is written with the token and never changes: a page
means the same whoever shares, copies or swaps it. The scale is float32, 32 bits for D codes.

The codes are int8, or e4m3 (OCP's 8-bit float). With a scale a token and head int8 is the closer
one: its steps are even, while e4m3 has 3 bits of mantissa for the largest values too (and keeps
small values beside large ones). GPUs from sm_89 on convert e4m3 by themselves.

What is proven is the rewrite, on codes that are not rounded (passes/certificate.py). How much the
rounding changes is measured beside it and held against the same program with every key and value
moved by the half step that rounding may move it.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

from aios_compile.errors import PassError
from aios_compile.ir import provenance
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fusion_groups import getitems, is_call
from aios_compile.passes.graph_pass import graph_pass

aios = torch.ops.aios
SCALES = torch.float32
CODES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}


class Match(NamedTuple):
    write: fx.Node
    k_cache: fx.Node
    v_cache: fx.Node
    attentions: list[fx.Node]


def _match(write: fx.Node) -> Match | Refusal:
    _, _, k_cache, v_cache, _ = write.args
    assert isinstance(k_cache, fx.Node) and isinstance(v_cache, fx.Node)
    readers = dict.fromkeys(u for item in getitems(write) for u in item.users)
    others = [u for u in readers if u.op != "output"]
    for reader in others:
        if not is_call(reader, aios.paged_attention.default):
            line = provenance.place(reader)
            return Refusal(f"{reader.target} reads the cached keys or values", line)
    return Match(write, k_cache, v_cache, others)


@graph_pass(numerics="lossy", required=True)
def quantize_kv(graph: fx.Graph, context: PassContext) -> int:
    """Write keys and values as 8-bit codes with a scale a token and head, and attend over those.

    Before::

        def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]",
              slots: "input i64[T]", query_starts: "input i64[S+1]",
              context_lengths: "input i64[S]", page_tables: "input i64[S, 8]",
              k_cache: "state f32[64, 2, 16, 16]", v_cache: "state f32[64, 2, 16, 16]"):
            caches = aios.kv_write.default(k, v, k_cache, v_cache, slots)
            out = aios.paged_attention.default(
                q, caches[0], caches[1], query_starts, context_lengths, page_tables, 0.25)
            return out, caches[0], caches[1]

    After::

        def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]",
              slots: "input i64[T]", query_starts: "input i64[S+1]",
              context_lengths: "input i64[S]", page_tables: "input i64[S, 8]",
              k_cache_int8: "state i8[64, 2, 16, 16]", v_cache_int8: "state i8[64, 2, 16, 16]",
              k_scales: "state f32[64, 2, 16]", v_scales: "state f32[64, 2, 16]"):
            caches = aios.quantized_kv_write.default(
                k, v, k_cache_int8, v_cache_int8, k_scales, v_scales, slots)
            out = aios.paged_attention.default(
                q, caches[0], caches[1], query_starts, context_lengths, page_tables, 0.25,
                k_scales=caches[2], v_scales=caches[3])
            return out, caches[0], caches[1], caches[2], caches[3]
    """
    if not context.options.quantize_kv:
        return 0
    hits = 0
    for write in graph.find_nodes(op="call_function", target=aios.kv_write.default):
        match = _match(write)
        if isinstance(match, Refusal):  # what was asked for is not left out in silence
            raise PassError(
                f"the KV cache cannot be {context.options.quantize_kv}: {match.reason}",
                source_line=match.source_line or None,
                advice="leave kv_cache_dtype at 'auto'",
            )
        _rewrite(graph, match, context)
        hits += 1
    return hits


def _rewrite(graph: fx.Graph, match: Match, context: PassContext) -> None:
    write, source = match.write, [match.write]
    states, kind = [], context.options.quantize_kv
    for name, cache in (("k", match.k_cache), ("v", match.v_cache)):
        shape = cache.meta["val"].shape
        states.append(context.add_state(graph, f"{name}_cache_{kind}", shape, CODES[kind]))
    pages, heads, _, page = match.k_cache.meta["val"].shape
    for name in ("k", "v"):
        states.append(context.add_state(graph, f"{name}_scales", (pages, heads, page), SCALES))
    k, v, slots = write.args[0], write.args[1], write.args[4]
    with graph.inserting_before(write):
        target = aios.quantized_kv_write.default
        new = context.call(graph, target, k, v, *states, slots, source=source)
        items = [context.call(graph, operator.getitem, new, i, source=source) for i in range(4)]
    for attention in match.attentions:
        attention.args = (attention.args[0], *items[:2], *attention.args[3:])
        attention.kwargs = {**attention.kwargs, "k_scales": items[2], "v_scales": items[3]}
    for cache in (match.k_cache, match.v_cache):
        context.drop_state(graph, cache)
    for state, item in zip(states, items):
        context.set_next_state(graph, state, item)
