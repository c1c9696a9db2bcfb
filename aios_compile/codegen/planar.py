"""Pack quantised rows for a GPU: a row's codes, then its scales, then its minimums.

planar.<format>: uint8 [N, planar_bytes]; each part begins at a multiple of 16 bytes, so that codes
are read 16 bytes at a time. Codes of four bits: byte b of 16 bytes holds k = b in its low and
k = 16 + b in its high half; codes of more bits take a byte each. Scales and minimums keep their
float dtype; those made of two numbers (k, zero) are stored as their float32 product, so that a
weight is always float(u + low) * scale - minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aios_compile.codegen.packing import check_finite
from aios_compile.codegen.plane import plane_of
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantized import SCALE_DTYPES, scales_of, unpack_fields

CHUNK_ROWS = 256


def pack_planar(rows: Tensor, form: QuantFormat, label: str = "weight") -> Tensor:
    """Return quantised rows uint8 [N, row_bytes] as planar uint8 [N, Plane.row_bytes].

    Raises CheckpointError when a scale or a minimum is NaN or infinite.
    """
    plane = plane_of(form, form.depth(rows.shape[1]))
    packed = torch.zeros(len(rows), plane.row_bytes, dtype=torch.uint8)
    for first in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[first : first + CHUNK_ROWS]
        fields, into = unpack_fields(form, chunk), packed[first : first + CHUNK_ROWS]
        codes = fields.codes
        if plane.bits == 4:
            halves = codes.reshape(len(codes), -1, 2, 16)
            codes = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)
        into[:, : codes.shape[1]] = codes
        scales, minimums = scales_of(form, fields)
        for values in (scales, minimums):
            if values is not None:
                check_finite(values.numpy(), label)
        _put(into, plane.scale_begin, scales, plane.scale_dtype)
        if minimums is not None:
            _put(into, plane.minimum_begin, minimums, plane.minimum_dtype)
    return packed


def _put(into: Tensor, begin: int, values: Tensor, dtype: str) -> None:
    data = values.to(SCALE_DTYPES[dtype]).contiguous().view(torch.uint8)
    into[:, begin : begin + data.shape[1]] = data
