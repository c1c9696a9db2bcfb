"""Rows of quantised formats in PyTorch: made, taken apart, dequantised; quantised activations.

These are the definitions; ir/quant_format.py says what a row looks like. N rows, K values a row,
G = K / group groups, B = K / 256 super-blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aios_compile.ir.quant_format import E4M3_MAX, UNIT_DEPTH, QuantFormat

ACTIVATION_GROUP = 32  # values of a token under one scale
SMALLEST = 2.0**-100  # a group of activations below it counts as zeros: 127 / x stays finite
# Largest code of a dtype that holds codes of a KV cache; 448 is E4M3's (no infinities: "fn").
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: E4M3_MAX}
SCALE_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class QuantFields:
    """The parts of a quantised matrix.

    codes: uint8 [N, K], u = code - low. scales: [N, G], the format's dtype, or int8 under
    super_scales float16 [N, B] (k). minimums: [N, G], the format's dtype, or uint8 under
    super_minimums float16 [N, B] (k) or under the scales (zero); None without.
    """

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None = None
    super_scales: Tensor | None = None
    super_minimums: Tensor | None = None


def pack_fields(form: QuantFormat, fields: QuantFields) -> Tensor:
    """Return the rows uint8 [N, row_bytes] of a matrix."""
    rows, depth = fields.codes.shape
    groups = depth // form.span, form.span // form.group
    kind = torch.int8 if form.scales == "k" else SCALE_DTYPES[form.scales]
    parts = [_pack_codes(fields.codes, form.bits).reshape(rows, *groups, -1)]
    parts.append(_bytes(fields.scales, kind).reshape(rows, *groups, -1))
    if form.minimums:
        assert fields.minimums is not None, f"{form.name} has minimums"
        kind = SCALE_DTYPES.get(form.minimums, torch.uint8)
        parts.append(_bytes(fields.minimums, kind).reshape(rows, *groups, -1))
    body = torch.cat(parts, -1).reshape(rows, groups[0], -1)
    heads = [s for s in (fields.super_scales, fields.super_minimums) if s is not None]
    assert 2 * len(heads) == form.header_bytes, f"{form.name}: {len(heads)} super scales"
    heads = [_bytes(s, torch.float16).reshape(rows, groups[0], 2) for s in heads]
    return torch.cat([*heads, body], -1).reshape(rows, -1)


def unpack_fields(form: QuantFormat, rows: Tensor) -> QuantFields:
    """Return the parts of rows uint8 [N, row_bytes]: what pack_fields was given."""
    count, depth = len(rows), form.depth(rows.shape[1])
    spans = rows.reshape(count, depth // form.span, form.span_bytes)
    num_heads = form.header_bytes // 2
    heads = spans[..., : form.header_bytes].reshape(count, spans.shape[1], num_heads, 2)
    supers = [_values(heads[:, :, i], torch.float16) for i in range(num_heads)]
    body = spans[..., form.header_bytes :].reshape(count, depth // form.group, form.group_bytes)
    codes = _unpack_codes(body[..., : form.code_bytes].reshape(count, -1), form.bits)
    rest = body[..., form.code_bytes :]
    size = 1 if form.scales == "k" else SCALE_DTYPES[form.scales].itemsize
    scales = _values(rest[..., :size], SCALE_DTYPES.get(form.scales, torch.int8))
    minimums = None
    if form.minimums:
        minimums = _values(rest[..., size:], SCALE_DTYPES.get(form.minimums, torch.uint8))
    super_scales = supers.pop(0) if form.scales == "k" else None
    super_minimums = supers.pop(0) if form.minimums == "k" else None
    return QuantFields(codes, scales, minimums, super_scales, super_minimums)


def scales_of(form: QuantFormat, fields: QuantFields) -> tuple[Tensor, Tensor | None]:
    """Return the scale and the minimum of each group, float32 [N, G]."""
    repeats = form.span // form.group
    scales = fields.scales.float()
    if fields.super_scales is not None:
        scales = scales * fields.super_scales.float().repeat_interleave(repeats, 1)
    if fields.minimums is None:
        return scales, None
    minimums = fields.minimums.float()
    if form.minimums == "zero":
        minimums = minimums * scales
    elif fields.super_minimums is not None:
        minimums = minimums * fields.super_minimums.float().repeat_interleave(repeats, 1)
    return scales, minimums


def code_values(form: QuantFormat, codes: Tensor) -> Tensor:
    """Return the numbers float32 [N, K] that codes uint8 [N, K] mean, before their scales."""
    if form.is_float:
        return codes.contiguous().view(torch.float8_e4m3fn).float()
    return codes.float() + form.low


def dequantize(rows: Tensor, form: QuantFormat) -> Tensor:
    """Return the matrix float32 [N, K] of quantised rows [N, row_bytes], or [E, N, K] of E such."""
    if rows.dim() == 3:
        return dequantize(rows.flatten(0, 1), form).reshape(*rows.shape[:2], -1)
    fields = unpack_fields(form, rows)
    count, depth = fields.codes.shape
    scales, minimums = scales_of(form, fields)
    codes = code_values(form, fields.codes).reshape(count, -1, form.group)
    values = codes * scales.unsqueeze(-1)
    values = values if minimums is None else values - minimums.unsqueeze(-1)
    return values.reshape(count, depth)


def dequantize_rows(rows: Tensor, form: str) -> Tensor:
    """Return dequantize() of rows of a named format."""
    return dequantize(rows, QuantFormat.parse(form))


def fake_dequantize_rows(rows: Tensor, form: str) -> Tensor:
    depth = QuantFormat.parse(form).depth(int(rows.shape[1]))
    return rows.new_empty(rows.shape[0], depth, dtype=torch.float32)


def quantized_embedding(rows: Tensor, ids: Tensor, form: str) -> Tensor:
    """Return the dequantised rows float32 [T, K] of ids [T]."""
    return dequantize(rows[ids], QuantFormat.parse(form))


def fake_quantized_embedding(rows: Tensor, ids: Tensor, form: str) -> Tensor:
    depth = QuantFormat.parse(form).depth(int(rows.shape[1]))
    return rows.new_empty(ids.shape[0], depth, dtype=torch.float32)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes int8 [..., K], scales float32 [..., K / 32]) of float32 x: x = code * scale.

    scale = max|x| / 127 of 32 consecutive values, code = x * (127 / max|x|), rounded half to even.
    """
    codes, scales = quantize_groups(x.reshape(*x.shape[:-1], -1, ACTIVATION_GROUP))
    return codes.reshape(x.shape), scales


def quantize_groups(
    groups: Tensor, dtype: torch.dtype = torch.int8, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Return codes [..., D] in a dtype of LARGEST_CODE, scales [...] of floats [..., D]: x = c * s.

    With int8, scale = max|x| / 127, code = x * (127 / max|x|), rounded half to even; with e4m3 the
    same with 448. What cannot be told from zeros has scale 0, what has a NaN has scale NaN and
    codes of 0. exact: codes as floats that are not rounded.
    """
    top = LARGEST_CODE[dtype]
    largest = groups.abs().amax(-1)
    live = ~(largest < SMALLEST)  # NaN is live: it must reach the result
    scales = torch.where(live, largest / top, 0.0)
    inverse = torch.where(live, top / largest, 0.0)
    codes = groups * inverse.unsqueeze(-1)
    if exact:
        return codes, scales
    if dtype == torch.int8:
        return codes.round().nan_to_num(0.0, 0.0, 0.0).to(dtype), scales
    return codes.nan_to_num(0.0, 0.0, 0.0).clamp(-top, top).to(dtype), scales


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    form: str,
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Return x @ dequantize(weight).T + bias, with the activations quantised as above.

    order: int32 [K], value k of a row of `weight` belongs to x[..., order[k]] (columns that were
    sorted by group); activations are quantised in that order.

    Codes that are floats meet activations as float_activations has them, one scale a token. Sums of
    whole numbers are whole numbers inside a group; float32 over the groups ascending. In float64
    nothing is rounded but the weights: the oracle has exact activations.
    """
    parsed = QuantFormat.parse(form)
    x = x if order is None else x[..., order]
    if x.dtype == torch.float64:
        return F.linear(x, dequantize(weight, parsed).double(), bias)
    fields = unpack_fields(parsed, weight)
    scales, minimums = scales_of(parsed, fields)
    if parsed.is_float:
        result = _float_linear(x.float(), code_values(parsed, fields.codes), scales)
        return (result if bias is None else result + bias.float()).to(x.dtype)
    codes, x_scales = quantize_activations(x.float())
    shape = (*x.shape[:-1], len(weight))
    left = codes.reshape(-1, codes.shape[-1]).float()
    right = fields.codes.float() + parsed.low
    x_scales = x_scales.reshape(len(left), -1)
    step = min(parsed.group, ACTIVATION_GROUP)
    total = left.new_zeros(len(left), len(weight))
    for k in range(0, left.shape[1], step):
        part = left[:, k : k + step]
        factor = x_scales[:, k // ACTIVATION_GROUP, None]
        product = part @ right[:, k : k + step].T  # whole numbers below 2^24: exact
        total += product * (factor * scales[:, k // parsed.group])
        if minimums is not None:
            total -= (factor * part.sum(-1, keepdim=True)) * minimums[:, k // parsed.group]
    result = total if bias is None else total + bias.float()
    return result.reshape(shape).to(x.dtype)


def float_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (float32 [..., K] of e4m3 numbers, scales float32 [...]) of x: x = number * scale.

    scale = max|x| / 448 of a token, number = x * (448 / max|x|), rounded half to even.
    """
    largest = x.abs().amax(-1)
    live = ~(largest < SMALLEST)
    inverse = torch.where(live, E4M3_MAX / largest, 0.0)
    numbers = (x * inverse.unsqueeze(-1)).to(torch.float8_e4m3fn).float()
    return numbers, torch.where(live, largest / E4M3_MAX, 0.0)


def _float_linear(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    numbers, x_scales = float_activations(x)
    step = weight.shape[1] // scales.shape[1]
    total = x.new_zeros(*x.shape[:-1], len(weight))
    for group in range(scales.shape[1]):
        at = slice(group * step, (group + 1) * step)
        total += F.linear(numbers[..., at], weight[:, at]) * scales[:, group]
    return total * x_scales.unsqueeze(-1)


def fake_quantized_linear(
    x: Tensor,
    weight: Tensor,
    form: str,
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    depth = QuantFormat.parse(form).depth(int(weight.shape[1]))
    assert depth == x.shape[-1], f"{form}: rows of {depth} values, x has {x.shape[-1]}"
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _bytes(values: Tensor, dtype: torch.dtype) -> Tensor:
    assert values.dtype == dtype, f"scales are {values.dtype}, the format says {dtype}"
    return values.contiguous().unsqueeze(-1).view(torch.uint8)


def _values(data: Tensor, dtype: torch.dtype) -> Tensor:
    # a copy, always: one row counts as contiguous whatever its stride and its offset are
    return data.clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the units uint8 [N, K * bits / 8] of codes uint8 [N, K]."""
    rows = len(codes)
    if bits == 8:
        return codes
    count = UNIT_DEPTH[bits] // 4
    quads = codes.reshape(rows, -1, count, 4)
    low = quads & 15
    units = [low[:, :, c] | low[:, :, c + 1] << 4 for c in range(0, count, 2)]
    if bits > 4:
        high = quads >> 4
        unit = high[:, :, 0]
        for c in range(1, count):
            unit = unit | high[:, :, c] << (c * (bits - 4))
        units.append(unit)
    return torch.stack(units, 2).reshape(rows, -1)


def _unpack_codes(data: Tensor, bits: int) -> Tensor:
    rows = len(data)
    if bits == 8:
        return data
    count = UNIT_DEPTH[bits] // 4
    units = data.reshape(rows, -1, count // 2 + (bits > 4), 4)
    quads = []
    for c in range(count):
        value = units[:, :, c // 2] >> 4 * (c % 2) & 15
        if bits > 4:
            width = bits - 4
            value = value | (units[:, :, -1] >> (c * width) & (1 << width) - 1) << 4
        quads.append(value)
    return torch.stack(quads, 2).reshape(rows, -1)
