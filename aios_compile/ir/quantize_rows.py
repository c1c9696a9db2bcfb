"""Quantise a matrix to the rows of a format, with a search for the scale of each group.

Symmetric groups: candidates for the scale send the largest value, with its sign, to the end of the
code range (which has one code more on its negative side) or a little inside or beyond it; each
candidate's codes get the scale that fits them best by least squares, and the one with the least
squared error stays. It is the search of llama.cpp's make_qx_quants. Asymmetric groups: the range
[min, max], shrunk at both ends, then refitted. Scales are rounded as they are stored before the
final codes are chosen, so that the codes make up for the rounding. 8-bit floats: the largest value
is sent to the largest number; steps are relative there, a search gains nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from aios_compile.ir.quant_format import E4M3_MAX, QuantFormat
from aios_compile.ir.quantized import SCALE_DTYPES, QuantFields, pack_fields

CHUNK_ELEMENTS = 1 << 18  # a chunk and its temporaries stay in the L2 and L3 caches
# How far inside (-) or beyond (+) the code range the largest value is sent, in codes.
REACHES = {4: (-1.2, -0.6, 0.0, 0.6, 1.2), 8: (0.0,)}
SHRINKS = {4: (1.0, 0.95, 0.9, 0.85, 0.8), 8: (1.0,)}  # of an asymmetric group's range


def quantize_rows(weight: Tensor, form: str) -> Tensor:
    """Return the rows uint8 [N, row_bytes] of a matrix [N, K] (any float), K a multiple of a group;
    of matrices [E, N, K] as [E, N, row_bytes].

    Values that are NaN or infinite give scales that are: packing finds them, with the tensor's
    name. Formats: int4 and int8, symmetric or with a minimum, scales and minimums f16, bf16 or f32.
    Memory: the result and a few MiB.
    """
    parsed = QuantFormat.parse(form)
    assert parsed.can_quantize, f"{form} is a format of files, nothing is quantised to it"
    if weight.dim() == 3:
        shape = (*weight.shape[:2], parsed.row_bytes(weight.shape[2]))
        found = torch.empty(shape, dtype=torch.uint8)
        for matrix, place in zip(weight, found):
            place.copy_(quantize_rows(matrix, form))
        return found
    rows, depth = weight.shape
    result = torch.empty(rows, parsed.row_bytes(depth), dtype=torch.uint8)
    step = max(1, CHUNK_ELEMENTS // max(1, depth))

    def quantize(first: int) -> None:
        part = weight[first : first + step].float()
        groups = part.reshape(-1, parsed.group)
        fields = _fields(groups, parsed)
        shape = (len(part), -1)
        minimums = None if fields.minimums is None else fields.minimums.reshape(shape)
        whole = QuantFields(fields.codes.reshape(shape), fields.scales.reshape(shape), minimums)
        result[first : first + step] = pack_fields(parsed, whole)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a chunk a thread: no barriers inside
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(quantize, range(0, rows, step)))
    finally:
        torch.set_num_threads(threads)
    return result


def fake_quantize_rows(weight: Tensor, form: str) -> Tensor:
    row_bytes = QuantFormat.parse(form).row_bytes(int(weight.shape[-1]))
    return weight.new_empty(*weight.shape[:-1], row_bytes, dtype=torch.uint8)


def _fields(groups: Tensor, form: QuantFormat) -> QuantFields:
    """Quantise groups float32 [M, group]."""
    if form.is_float:
        return _floats(groups, form)
    return _asymmetric(groups, form) if form.minimums else _symmetric(groups, form)


def _floats(groups: Tensor, form: QuantFormat) -> QuantFields:
    """Send the largest value of a group to the largest 8-bit float; what is beyond it saturates."""
    scale = (groups.abs().amax(-1, True) / E4M3_MAX).to(SCALE_DTYPES[form.scales])
    inverse = torch.where(scale != 0, 1 / scale.float(), 0.0)
    numbers = (groups * inverse).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return QuantFields(numbers.view(torch.uint8), scale)


def _symmetric(groups: Tensor, form: QuantFormat) -> QuantFields:
    """Quantise groups float32 [M, group] by scale alone."""
    low, high = form.low, -form.low - 1
    smallest, largest = groups.amin(-1, True), groups.amax(-1, True)
    if form.bits == 8:  # one code more or less of 255 gains nothing: keep -127 .. 127
        extreme = torch.maximum(largest, -smallest) / high
        return _rounded(groups, extreme, None, form)
    extreme = torch.where(largest > -smallest, largest, smallest)
    best = extreme / low
    gain = torch.full_like(best, -1.0)
    codes, scratch = torch.empty_like(groups), torch.empty_like(groups)
    for reach in REACHES[form.bits]:
        inverse = (low - reach) / extreme
        torch.mul(groups, inverse.nan_to_num(0.0, 0.0, 0.0), out=codes)
        codes.round_().clamp_(low, high)
        dot = torch.mul(codes, groups, out=scratch).sum(-1, True)
        norm = torch.mul(codes, codes, out=scratch).sum(-1, True)
        found = torch.where(norm > 0, dot * dot / norm, 0.0)  # what the error falls by
        better = found > gain
        best = torch.where(better, dot / norm.clamp_min(1.0), best)
        gain = torch.where(better, found, gain)
    return _rounded(groups, best, None, form)


def _asymmetric(groups: Tensor, form: QuantFormat) -> QuantFields:
    """Quantise groups float32 [M, group] by scale and minimum."""
    top = (1 << form.bits) - 1
    smallest, largest = groups.amin(-1, True), groups.amax(-1, True)
    scale, minimum = (largest - smallest) / top, -smallest
    least = torch.full_like(scale, torch.inf)
    best = scale, minimum
    middle, mean = (largest + smallest) / 2, groups.mean(-1, True)
    for shrink in SHRINKS[form.bits]:
        width = (largest - smallest) * shrink
        codes = _codes(groups, width / top, width / 2 - middle, 0, top)
        centred = codes - codes.mean(-1, True)
        spread = (centred * centred).sum(-1, True)
        fitted = torch.where(spread > 0, (centred * groups).sum(-1, True) / spread, scale)
        offset = fitted * codes.mean(-1, True) - mean
        error = (codes * fitted - offset - groups).square().sum(-1, True)
        better = error < least
        best = torch.where(better, fitted, best[0]), torch.where(better, offset, best[1])
        least = torch.where(better, error, least)
    return _rounded(groups, best[0], best[1], form)


def _rounded(
    groups: Tensor, scale: Tensor, minimum: Tensor | None, form: QuantFormat
) -> QuantFields:
    """Round scale and minimum as they are stored and choose each code for them."""
    stored = scale.to(SCALE_DTYPES[form.scales])
    stored_minimum = None if minimum is None else minimum.to(SCALE_DTYPES[form.minimums])
    offset = 0.0 if stored_minimum is None else stored_minimum.float()
    high = form.low + (1 << form.bits) - 1
    low = -high if form.bits == 8 and form.low else form.low
    codes = _codes(groups, stored.float(), offset, low, high) - form.low
    return QuantFields(codes.to(torch.uint8), stored, stored_minimum)


def _codes(groups: Tensor, scale: Tensor, minimum: Tensor | float, low: int, high: int) -> Tensor:
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    return ((groups + minimum) * inverse).nan_to_num_(0.0).round_().clamp_(low, high)
