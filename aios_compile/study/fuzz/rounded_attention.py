"""aios.paged_attention over caches of codes, rounding what the Triton kernel rounds.

Queries, and probabilities times the values' scales, meet codes as bfloat16 on the tensor cores
(codegen/triton/templates/paged_attention.py.txt). Probabilities are relative to the largest score
of a block of keys: here of all keys, the same up to 64 of them (32 in heads wider than 128).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from aios_compile.ir import snapshot
from aios_compile.ir.attention_reference import falling, visible
from aios_compile.ir.module import IRModule


def with_rounded_attention(module: IRModule) -> IRModule:
    """Return a copy of a program whose attention over codes rounds as the kernel does."""
    copied = snapshot.take(module)
    for graph_module in copied.root.modules():
        if not isinstance(graph_module, fx.GraphModule):
            continue
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.aios.paged_attention.default and "k_scales" in node.kwargs:
                node.target = paged_attention
    return copied


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    page_tables: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    alibi: list[float] | None = None,
    *,
    k_scales: Tensor,
    v_scales: Tensor,
) -> Tensor:
    """Attend q[T, H, D] to the pages of each sequence; return [T, H, Dv]."""
    out = q.new_zeros(*q.shape[:-1], v_cache.shape[-1])
    groups = q.shape[1] // k_cache.shape[1]
    for s, length in enumerate(context_lengths.tolist()):
        begin, end = int(query_starts[s]), int(query_starts[s + 1])
        if begin == end:
            continue
        pages = page_tables[s, : -(-length // v_cache.shape[2])]
        k = k_cache[pages].to(q.dtype).permute(1, 0, 3, 2).flatten(1, 2)[:, :length]
        v = v_cache[pages].to(q.dtype).permute(1, 0, 2, 3).flatten(1, 2)[:, :length]
        own = [x[pages].transpose(0, 1).flatten(1)[:, :length] for x in (k_scales, v_scales)]
        k, v, k_scale, v_scale = (x.repeat_interleave(groups, 0) for x in (k, v, *own))
        positions = torch.arange(length - (end - begin), length)
        scores = _in_bf16(q[begin:end].transpose(0, 1)) @ k.transpose(1, 2)
        scores = scores * k_scale[:, None] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi is not None:
            bias = falling(alibi, positions, length)
            assert bias is not None
            scores = scores + bias.to(q.dtype)
        scores = scores.masked_fill(~visible(positions, length, window, chunk), float("-inf"))
        most = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - most)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks.to(q.dtype)[:, None, None] - most)
        out[begin:end] = (_in_bf16(weights * v_scale[:, None]) @ v / total).transpose(0, 1)
    return out


def _in_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)
