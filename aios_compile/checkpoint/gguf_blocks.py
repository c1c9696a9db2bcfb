"""The block types of ggml: bytes to codes and scales, and to float32.

A row is a run of blocks. Every type here comes down to the same form, for groups of weights:

    weight = scale * code - minimum           float32, each operation rounded once

so that codes and scales can also be handed on as they are. In the K types a group's scale and
minimum are themselves 6 or 8 bit codes times the block's float16: two roundings, as in
ggml-quants.c (dequantize_row_*), to which the results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# ggml's numbers of all types (ggml.h), so that one that is refused is refused by its name.
GGML_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_2", 5: "Q4_3", 6: "Q5_0", 7: "Q5_1",
    8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    30: "BF16", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
FLOAT_TYPES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}  # bytes a weight


class Groups(NamedTuple):
    """Blocks taken apart. n blocks of G groups of g weights, as they are stored.

    codes: uint8 [n, G, g], which `low` of the block type is added to. scales: float16 [n, G], or
    int8 under super_scales float16 [n, 1]. minimums: float16 [n, G], or uint8 under super_minimums
    float16 [n, 1]; None for zero.
    """

    codes: NDArray[Any]
    scales: NDArray[Any]
    minimums: NDArray[Any] | None = None
    super_scales: NDArray[np.float16] | None = None
    super_minimums: NDArray[np.float16] | None = None


@dataclass(frozen=True)
class BlockType:
    """Sizes of a block, what is added to its codes, `unpack`: uint8 [n, num_bytes] to Groups; the
    format of ir/quant_format.py that holds the same.
    """

    num_weights: int
    num_bytes: int
    low: int
    unpack: Callable[[Bytes], Groups]
    form: str


def dequantize(dtype: str, data: Bytes) -> Floats:
    """Return the float32 weights [rows, columns] of uint8 rows [rows, bytes of a row]."""
    block = BLOCK_TYPES[dtype]
    groups = block.unpack(data.reshape(-1, block.num_bytes))
    with np.errstate(invalid="ignore"):  # an infinite scale: found by name when weights are packed
        values: Floats = groups.codes.astype(np.float32)
        values += np.float32(block.low)
        values *= _whole(groups.scales, groups.super_scales)
        if groups.minimums is not None:
            values -= _whole(groups.minimums, groups.super_minimums)
    return values.reshape(len(data), -1)


def _whole(scales: NDArray[Any], supers: NDArray[np.float16] | None) -> Floats:
    """Return scales as float32 [n, G, 1]."""
    values = scales.astype(np.float32)
    if supers is not None:
        values = supers.astype(np.float32) * values
    return values[:, :, None]


def _half(data: Bytes) -> NDArray[np.float16]:
    """Return pairs of bytes [n, 2] as float16 [n, 1]."""
    return np.ascontiguousarray(data).view("<f2")


def _nibbles(data: Bytes) -> Bytes:
    """Return [n, ..., 2 * bytes]: all low halves of the bytes, then all high ones."""
    return np.concatenate((data & 0xF, data >> 4), axis=-1)


def _bits(data: Bytes) -> Bytes:
    """Return the 32 bits of [n, 4] bytes, lowest first: [n, 32]."""
    return np.unpackbits(data, axis=-1, bitorder="little")


def _q4_0(b: Bytes) -> Groups:
    return Groups(_nibbles(b[:, 2:])[:, None], _half(b[:, :2]))


def _q4_1(b: Bytes) -> Groups:
    return Groups(_nibbles(b[:, 4:])[:, None], _half(b[:, :2]), -_half(b[:, 2:4]))


def _q5_0(b: Bytes) -> Groups:
    codes = _nibbles(b[:, 6:]) | _bits(b[:, 2:6]) << 4
    return Groups(codes[:, None], _half(b[:, :2]))


def _q5_1(b: Bytes) -> Groups:
    codes = _nibbles(b[:, 8:]) | _bits(b[:, 4:8]) << 4
    return Groups(codes[:, None], _half(b[:, :2]), -_half(b[:, 2:4]))


def _q8_0(b: Bytes) -> Groups:
    return Groups(b[:, None, 2:] ^ 0x80, _half(b[:, :2]))  # int8 + 128


def _k_scales(b: Bytes) -> tuple[NDArray[Any], ...]:
    """Return 8 scales, 8 minimums, d, dmin of a block that begins with d, dmin and 12 bytes.

    Bytes 0-3 and 4-7 hold the first four of each in their low 6 bits; the last four have 4 bits in
    bytes 8-11 (scale low, minimum high) and their upper 2 bits on top of the first eight bytes
    (ggml's get_scale_min_k4).
    """
    scale, minimum, low = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate((scale & 63, low & 0xF | scale >> 6 << 4), axis=1)
    minimums = np.concatenate((minimum & 63, low >> 4 | minimum >> 6 << 4), axis=1)
    return scales.view(np.int8), minimums, _half(b[:, :2]), _half(b[:, 2:4])


def _q4_k(b: Bytes) -> Groups:
    """4 runs of 32 bytes: the low halves are one group of 32, the high halves the next."""
    codes = _nibbles(b[:, 16:].reshape(-1, 4, 32))
    return Groups(codes.reshape(-1, 8, 32), *_k_scales(b))


def _q5_k(b: Bytes) -> Groups:
    """As Q4_K; the fifth bits of group i are the bits i of 32 bytes."""
    fifth = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth << 4
    return Groups(codes, *_k_scales(b))


def _q6_k(b: Bytes) -> Groups:
    """2 halves of 128 weights: 64 bytes of low halves, 32 bytes that hold four upper bit pairs."""
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return Groups((low | high << 4).reshape(-1, 16, 16), scales, None, _half(b[:, 208:]))


BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q8_0": BlockType(32, 34, -128, _q8_0, "int8_g32_f16"),
    "Q4_0": BlockType(32, 18, -8, _q4_0, "int4_g32_f16"),
    "Q4_1": BlockType(32, 20, 0, _q4_1, "uint4_g32_f16_min_f16"),
    "Q5_0": BlockType(32, 22, -16, _q5_0, "int5_g32_f16"),
    "Q5_1": BlockType(32, 24, 0, _q5_1, "uint5_g32_f16_min_f16"),
    "Q4_K": BlockType(256, 144, 0, _q4_k, "uint4_g32_k_min_k"),
    "Q5_K": BlockType(256, 176, 0, _q5_k, "uint5_g32_k_min_k"),
    "Q6_K": BlockType(256, 210, -32, _q6_k, "int6_g16_k"),
}
