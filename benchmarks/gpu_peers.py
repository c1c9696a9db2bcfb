"""Peers of benchmarks/gpu.py: torch.compile on a decoder with a static cache, cuBLAS, SDPA.

The decoder is the plain one that everybody writes for `max-autotune`: fixed shapes, a cache as long
as the context, weights of the shapes of ours (merged as ours are), one CUDA graph a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_clock import Clock, discard


class Layer(nn.Module):
    """A decoder layer for one new token of each sequence, over a cache of fixed length."""

    def __init__(self, config: dict[str, Any], batch: int, length: int) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.size = config.get("head_dim", hidden // self.heads)
        wide = (self.heads + 2 * self.groups) * self.size
        self.qkv = nn.Linear(hidden, wide, bias=False)
        self.out = nn.Linear(self.heads * self.size, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.first, self.second = (nn.RMSNorm(hidden, config["rms_norm_eps"]) for _ in range(2))
        cache = torch.randn(2, batch, self.groups, length, self.size)
        self.register_buffer("cache", cache)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
        batch = x.shape[0]
        heads = self.qkv(self.first(x)).view(batch, -1, self.size)
        q, k, v = heads.split([self.heads, self.groups, self.groups], 1)
        q, k = (_rotate(y, cos, sin) for y in (q, k))
        cache: Tensor = self.cache
        cache[0].index_copy_(2, at, k[:, :, None])
        cache[1].index_copy_(2, at, v[:, :, None])
        y = F.scaled_dot_product_attention(q[:, :, None], cache[0], cache[1], enable_gqa=True)
        x = x + self.out(y.reshape(batch, -1))
        gate, up = self.gate_up(self.second(x)).chunk(2, -1)
        result: Tensor = x + self.down(F.silu(gate) * up)
        return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder(nn.Module):
    """Token ids [B] at one position to the most likely next ids [B]."""

    def __init__(self, config: dict[str, Any], batch: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(config["vocab_size"], config["hidden_size"])
        layers = [Layer(config, batch, length) for _ in range(config["num_hidden_layers"])]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, at)
        return self.head(self.norm(x)).argmax(-1)


def decode_row(
    config: dict[str, Any], batch: int, context: int, clock: Clock, compiled: bool
) -> dict[str, Any]:
    """Time a step of the static decoder: max-autotune with CUDA graphs, or eager."""
    import time

    begin = time.perf_counter()
    with torch.device(clock.torch_device), torch.no_grad():
        model = Decoder(config, batch, context).bfloat16()
        half = model.layers[0].size // 2  # type: ignore[union-attr,operator]
        cos, sin = (torch.rand(half).bfloat16() for _ in range(2))
        ids, at = torch.zeros(batch, dtype=torch.long), torch.tensor([context - 1])
    step: Any = torch.compile(model, mode="max-autotune", fullgraph=True) if compiled else model

    def run() -> None:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            discard(step(ids, cos, sin, at))

    run()
    ready = time.perf_counter() - begin
    us = clock.median_us(run)
    return {"step_us": us, "ready_seconds": ready, "tokens_per_s": batch * 1e6 / us}


def linear_row(rows: int, depth: int, tokens: int, clock: Clock) -> dict[str, Any]:
    """Time cuBLAS on x[tokens, depth] @ w[rows, depth].T; many weights, so that L2 is cold."""
    copies = max(1, (256 << 20) // (rows * depth * 2)) if clock.cuda else 2
    x = torch.randn(tokens, depth, device=clock.torch_device).bfloat16()
    ws = [torch.randn(rows, depth, device=clock.torch_device).bfloat16() for _ in range(copies)]
    us = clock.median_us(lambda: [discard(torch.mm(x, w.T)) for w in ws] and None) / copies
    size = 2 * rows * depth
    return {"us": us, "share_of_bandwidth": size / clock.bytes_per_us() / us,
            "share_of_peak": 2.0 * tokens * rows * depth / us / clock.flops_per_us}  # fmt: skip


def attention_row(heads: int, groups: int, size: int, length: int, clock: Clock) -> dict[str, Any]:
    """Time SDPA's causal prefill of one sequence."""
    q, k, v = (
        torch.randn(1, n, length, size, device=clock.torch_device).bfloat16()
        for n in (heads, groups, groups)
    )
    us = clock.median_us(
        lambda: discard(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    )
    return {"us": us, "share_of_peak": 2.0 * heads * size * length**2 / us / clock.flops_per_us}
