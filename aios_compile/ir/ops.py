"""The op table: schema, eager reference and fake of every `aios::` op.

The reference is the definition of correct for each pass, kernel and fuzz test. Shapes: T tokens,
H query heads, G key/value heads, D head width, R logit rows, S sequences, N pages. All ops are
functional; `kv_write` returns new caches and only `plan_memory` makes it write in place. Half
precision inputs are multiplied in float32 and rounded once at the end. Results are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aios_compile.ir import attention_reference, quantize_rows, quantized, sample_op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Op:
    """One row of the op table."""

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    doc: str


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of accumulation: float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    w = weight.to(wide(x.dtype))
    b = None if bias is None else bias.to(wide(x.dtype))
    return F.linear(x.to(wide(x.dtype)), w, b).to(x.dtype)


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rounded = x if x.dtype == torch.float64 else x.to(torch.bfloat16).to(x.dtype)
    return linear(rounded, weight, bias)


def expert_linear(x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None = None) -> Tensor:
    return _by_expert(linear, x, weight, experts, bias)


def quantized_expert_linear(
    x: Tensor, weight: Tensor, experts: Tensor, form: str, bias: Tensor | None = None
) -> Tensor:
    def product(x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        return quantized.quantized_linear(x, rows, form, bias)

    return _by_expert(product, x, weight, experts, bias)


def _by_expert(
    product: Callable[..., Tensor], x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None
) -> Tensor:
    rows = torch.arange(experts.shape[0]) // (experts.shape[0] // x.shape[0])
    out = x.new_empty(experts.shape[0], weight.shape[1])
    for expert in range(weight.shape[0]):  # one at a time: all chosen matrices would not fit
        own = experts == expert
        if not own.any():
            continue
        chosen = None if bias is None else bias[expert]
        out[own] = product(x[rows[own]], weight[expert], chosen)
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, scale_in_float32: bool) -> Tensor:
    h = x.to(wide(x.dtype))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return h.to(x.dtype).contiguous()
    w = weight.to(wide(x.dtype))
    h = h * w if scale_in_float32 else w * h.to(x.dtype)
    return h.to(x.dtype).contiguous()


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    h = x.to(wide(x.dtype))
    centred = h - h.mean(-1, keepdim=True)
    h = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    h = h if weight is None else h * weight.to(h.dtype)
    return (h if bias is None else h + bias.to(h.dtype)).to(x.dtype).contiguous()


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    if width % 2:  # a single element would be broadcast into a pair
        raise ValueError(f"rope turns pairs of elements; a width of {width} is odd")
    head, tail = x[..., :width], x[..., width:]
    if interleaved:
        turned = torch.stack((-head[..., 1::2], head[..., 0::2]), -1).reshape(head.shape)
    else:
        turned = torch.cat((-head[..., width // 2 :], head[..., : width // 2]), -1)
    rotated = head * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)
    return torch.cat((rotated, tail), -1).to(x.dtype).contiguous()


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if gate.shape != up.shape:
        raise ValueError(f"a gate of {tuple(gate.shape)} for values of {tuple(up.shape)}")
    return (ACTIVATIONS[activation](gate) * up).contiguous()


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    if softcap is not None or sinks is not None:
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return attention_reference.masked(q, k, v, mask, is_causal, factor, softcap, sinks)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    ).contiguous()


def _fake_like_first(x: Tensor, *unused: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_expert_linear(x: Tensor, weight: Tensor, experts: Tensor, *unused: Any) -> Tensor:
    return x.new_empty(experts.shape[0], weight.shape[1])


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *unused: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _fake_paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, *unused: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], v_cache.shape[-1])


def _fake_kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    return k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)


def _fake_quantized_kv_write(
    k: Tensor, v: Tensor, *states_and_slots: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = [state.new_empty(state.shape) for state in states_and_slots[:4]]
    return new[0], new[1], new[2], new[3]


_MASK = (
    "float scale, int? window=None, float? softcap=None, int? chunk=None, Tensor? sinks=None, "
    "float[]? alibi=None"
)

OPS: tuple[Op, ...] = (
    Op(
        "linear",
        "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        linear,
        _fake_linear,
        "x[..., K] @ weight[N, K].T + bias[N]; a half-precision weight is upcast, exactly",
    ),
    Op(
        "bf16_linear",
        "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        bf16_linear,
        _fake_linear,
        "linear of a bf16 weight with x rounded to bf16 (nearest even) first: products are exact, "
        "sums in x's dtype; in float64 x stays exact",
    ),
    Op(
        "expert_linear",
        "(Tensor x, Tensor weight, Tensor experts, Tensor? bias=None) -> Tensor",
        expert_linear,
        _fake_expert_linear,
        "row p: x[p // (P / M)] @ weight[experts[p]].T + bias[experts[p]], of x[M, K], experts[P], "
        "weight[E, N, K], bias[E, N]: a mixture's matrix product, P / M choices a token",
    ),
    Op(
        "quantized_expert_linear",
        "(Tensor x, Tensor weight, Tensor experts, str form, Tensor? bias=None) -> Tensor",
        quantized_expert_linear,
        _fake_expert_linear,
        "expert_linear on rows uint8[E, N, row_bytes] of a format, x quantised to int8 as by "
        "quantized_linear",
    ),
    Op(
        "rms_norm",
        "(Tensor x, Tensor? weight, float eps, bool scale_in_float32) -> Tensor",
        rms_norm,
        _fake_like_first,
        "x * rsqrt(mean(x^2) + eps) * weight over the last dimension, statistics in float32; the "
        "product with the weight before (scale_in_float32) or after the cast to x's dtype",
    ),
    Op(
        "layer_norm",
        "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
        layer_norm,
        _fake_like_first,
        "(x - mean(x)) * rsqrt(var(x) + eps) * weight + bias over the last dimension",
    ),
    Op(
        "rope",
        "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
        rope,
        _fake_like_first,
        "rotary embedding of x[..., T, H, D] by full-width tables [..., T, R]; R..D pass through",
    ),
    Op(
        "gated_activation",
        "(Tensor gate, Tensor up, str activation) -> Tensor",
        gated_activation,
        _fake_like_first,
        "activation(gate) * up: SwiGLU, GeGLU and their kin",
    ),
    Op(
        "sdpa",
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale, "
        "bool enable_gqa, float? softcap=None, Tensor? sinks=None) -> Tensor",
        sdpa,
        _fake_attention,
        "scaled_dot_product_attention as the model called it, or a foreign attention with a soft "
        "cap or sinks; level 1 only",
    ),
    Op(
        "attention",
        f"(Tensor q, Tensor k, Tensor v, {_MASK}) -> Tensor",
        attention_reference.attention,
        _fake_attention,
        "causal attention of one sequence: q[T, H, D], k[T, G, D], v[T, G, Dv] -> [T, H, Dv]; "
        "alibi: a slope for each query head, times the distance (negative), is added to the scores",
    ),
    Op(
        "paged_attention",
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor query_starts, Tensor context_lengths, "
        f"Tensor page_tables, {_MASK}, Tensor? k_scales=None, Tensor? v_scales=None, "
        "bool rounded=False) -> Tensor",
        attention_reference.paged_attention,
        _fake_paged_attention,
        "causal attention of a flat batch over pages: k_cache[N, G, D, page], v_cache[N, G, page, "
        "Dv]; the keys of this step are in the caches already; codes have scales[N, G, page]; "
        "rounded: q and the probabilities are rounded for dot products, to bf16 or, over codes, to "
        "16 bits under a scale (q of a head of a token; in float64 they stay exact)",
    ),
    Op(
        "kv_write",
        "(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slots) -> (Tensor, Tensor)",
        attention_reference.kv_write,
        _fake_kv_write,
        "write k[T, G, D], v[T, G, Dv] to slots[T] = page * page_size + offset",
    ),
    Op(
        "quantized_kv_write",
        "(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_scales, Tensor v_scales, "
        "Tensor slots) -> (Tensor, Tensor, Tensor, Tensor)",
        attention_reference.quantized_kv_write,
        _fake_quantized_kv_write,
        "kv_write to int8 or e4m3 caches: code = round(x * c / max|x|) over a head of a token, its "
        "scale max|x| / c in scales[N, G, page]; c = 127, for e4m3 448",
    ),
    Op(
        "quantize_rows",
        "(Tensor weight, str form) -> Tensor",
        quantize_rows.quantize_rows,
        quantize_rows.fake_quantize_rows,
        "weight[N, K] as the rows uint8[N, row_bytes] of a format (ir/quant_format.py); of "
        "[E, N, K] as [E, N, row_bytes]",
    ),
    Op(
        "dequantize_rows",
        "(Tensor rows, str form) -> Tensor",
        quantized.dequantize_rows,
        quantized.fake_dequantize_rows,
        "the matrix float32[N, K] of rows uint8[N, row_bytes] of a format (ir/quant_format.py)",
    ),
    Op(
        "quantized_embedding",
        "(Tensor rows, Tensor ids, str form) -> Tensor",
        quantized.quantized_embedding,
        quantized.fake_quantized_embedding,
        "rows ids[T] of a table of rows uint8[N, row_bytes] of a format, dequantised to float32",
    ),
    Op(
        "quantized_linear",
        "(Tensor x, Tensor weight, str form, Tensor? bias=None, Tensor? order=None) -> Tensor",
        quantized.quantized_linear,
        quantized.fake_quantized_linear,
        "x[..., K] @ dequantised weight[N, K].T + bias[N]: rows uint8[N, row_bytes] of a format, x "
        "quantised to int8 by token and 32 values; in float64 x stays exact; with order[K], value "
        "k of a row belongs to x[..., order[k]]",
    ),
    Op(
        "sample",
        sample_op.SCHEMA,
        sample_op.reference,
        sample_op.fake,
        "logprobs, penalties, masks and one seeded Gumbel-max draw for each row of logits[R, V]",
    ),
)

_LIBRARY: Any = torch.library.Library("aios", "DEF")  # type: ignore[no-untyped-call]
for _op in OPS:
    _LIBRARY.define(_op.name + _op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_op.name, _op.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"aios::{_op.name}", _op.fake, lib=_LIBRARY)

TABLE: dict[str, Op] = {op.name: op for op in OPS}
