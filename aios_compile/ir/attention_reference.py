"""Eager references of attention, dense and paged, and of the KV write."""

from __future__ import annotations

import torch
from torch import Tensor

from aios_compile.ir.quantized import LARGEST_CODE, quantize_groups


def visible(
    query_positions: Tensor, num_keys: int, window: int | None, chunk: int | None
) -> Tensor:
    """Return bool [queries, keys]: causal, within the window, and within the query's chunk."""
    keys = torch.arange(num_keys, device=query_positions.device)[None]
    positions = query_positions[:, None]
    mask = keys <= positions
    if window is not None:
        mask = mask & (keys > positions - window)
    if chunk is not None:
        mask = mask & (keys // chunk == positions // chunk)
    return mask


def falling(alibi: list[float] | None, positions: Tensor, num_keys: int) -> Tensor | None:
    """Return slope * (key - query) [H, Q, K]: attention with linear biases (Press et al., 2021)."""
    if alibi is None:
        return None
    distance = torch.arange(num_keys, device=positions.device)[None] - positions[:, None]
    slopes = torch.tensor(alibi, dtype=torch.float64, device=positions.device)
    return slopes[:, None, None] * distance


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None = None,
    rounded: bool = False,
) -> Tensor:
    """Attend q[Q, H, D] to k[K, G, D], v[K, G, Dv] under mask[Q, K]; return [Q, H, Dv].

    Half precision is computed in float32 and rounded once. `sinks` [H] is one extra logit a head
    that takes probability and carries no value. `bias` [H, Q, K] is added to the capped scores.
    rounded: probabilities relative to the largest are rounded to bf16 before they are summed.
    """
    wide = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    groups = q.shape[1] // k.shape[1]
    keys = k.to(wide).repeat_interleave(groups, 1)
    values = v.to(wide).repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    scores = scores.masked_fill(~mask[None], float("-inf"))
    if rounded:
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - top).to(torch.bfloat16).to(wide)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks.to(wide)[:, None, None] - top)
        weights = weights / total
    elif sinks is not None:
        column = sinks.to(wide)[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype).contiguous()


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend q[..., H, T, D] to k, v[..., G, T, D] under a bool or additive mask; [..., H, T, Dv].

    What scaled_dot_product_attention would do if it knew soft caps and sinks.
    """
    wide = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    groups = q.shape[-3] // k.shape[-3]
    keys = k.to(wide).repeat_interleave(groups, -3)
    values = v.to(wide).repeat_interleave(groups, -3)
    scores = q.to(wide) @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(wide)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return (weights @ values).to(q.dtype).contiguous()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    alibi: list[float] | None = None,
) -> Tensor:
    """Attend q[T, H, D] of one sequence to k[T, G, D], v[T, G, Dv]; return [T, H, Dv].

    Causal, within `window` tokens and within chunks of `chunk` tokens where given. sinks: [H];
    alibi: one slope a head.
    """
    positions = torch.arange(q.shape[0], device=q.device)
    mask, bias = visible(positions, k.shape[0], window, chunk), falling(alibi, positions, len(k))
    return attend(q, k, v, mask, scale, softcap, sinks, bias)


def can_round(codes: bool, width: int, v_width: int) -> bool:
    """Return whether heads of these widths can be attended to with `rounded`: whole vectors of dot
    products, and sums of 16-bit queries times codes below 2^31.
    """
    if codes:
        return width % 4 == 0 and width <= 512 and v_width % 64 == 0
    return width % 2 == 0 and v_width % 16 == 0


def in_16_bits(q: Tensor) -> Tensor:
    """Round q[T, H, D] to whole numbers of max|q| / 32512 of its head: 256 * 127."""
    scales = q.abs().amax(-1, keepdim=True) / 32512
    return torch.where(scales > 0, torch.round(q / scales) * scales, 0)


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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rounded: bool = False,
) -> Tensor:
    """Attend q[T, H, D] to the pages of each sequence; return [T, H, Dv] in q's dtype.

    k_cache[N, G, D, page], v_cache[N, G, page, Dv]: floats, or codes with scales [N, G, page].
    query_starts: int64 [S+1], where each sequence's tokens begin among the T. context_lengths:
    int64 [S], its keys, the new ones included. page_tables: int64 [S, P]. Window, softcap, chunk,
    sinks and alibi as in `attention`. rounded: round what the C++ kernels round for their dot
    products.
    """
    rounded = rounded and q.dtype != torch.float64
    if rounded:
        q = q.to(torch.bfloat16).to(q.dtype) if k_scales is None else in_16_bits(q)
    in_bf16 = rounded and k_scales is None
    page_size = v_cache.shape[2]
    out = q.new_zeros(*q.shape[:-1], v_cache.shape[-1])
    for s, length in enumerate(context_lengths.tolist()):
        begin, end = int(query_starts[s]), int(query_starts[s + 1])
        if begin == end:
            continue
        pages = page_tables[s, : -(-length // page_size)]
        k, v = k_cache[pages], v_cache[pages]
        if k_scales is not None and v_scales is not None:
            k, v = k.to(k_scales.dtype), v.to(v_scales.dtype)  # PyTorch promotes no 8-bit floats
            k, v = k * k_scales[pages].unsqueeze(2), v * v_scales[pages].unsqueeze(3)
        k = k.permute(0, 3, 1, 2).flatten(0, 1)[:length]
        v = v.permute(0, 2, 1, 3).flatten(0, 1)[:length]
        positions = torch.arange(length - (end - begin), length, device=q.device)
        mask = visible(positions, length, window, chunk)
        bias = falling(alibi, positions, length)
        part = q[begin:end]
        out[begin:end] = attend(part, k, v, mask, scale, softcap, sinks, bias, in_bf16)
    return out


def kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Return both caches with k[T, G, D] and v[T, G, Dv] written to slots, int64 [T].

    Slot s is place s % page of page s // page. Values are rounded to the caches' dtype.
    """
    page_size = v_cache.shape[2]
    pages, offsets = slots // page_size, slots % page_size
    new_k, new_v = k_cache.clone(), v_cache.clone()
    new_k[pages, :, :, offsets] = k.to(k_cache.dtype)
    new_v[pages, :, offsets, :] = v.to(v_cache.dtype)
    return new_k, new_v


def quantized_kv_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return caches and scales with k and v written as codes, one scale a token and head.

    Caches int8 or float8_e4m3fn as in kv_write, scales [N, G, page]. Caches of floats, as in
    proofs, get codes that are not rounded.
    """
    kind = k_cache.dtype
    exact = kind not in LARGEST_CODE  # while a pass is proven: rounding would hide what it does
    kind = torch.int8 if exact else kind
    page_size = v_cache.shape[2]
    pages, offsets = slots // page_size, slots % page_size
    new_k_scales, new_v_scales = k_scales.clone(), v_scales.clone()
    k_codes, new_k_scales[pages, :, offsets] = quantize_groups(
        k.to(k_scales.dtype), kind, exact=exact
    )
    v_codes, new_v_scales[pages, :, offsets] = quantize_groups(
        v.to(v_scales.dtype), kind, exact=exact
    )
    new_k, new_v = kv_write(k_codes, v_codes, k_cache, v_cache, slots)
    return new_k, new_v, new_k_scales, new_v_scales
