"""How a quantised matrix is represented: one tensor uint8 [N, row_bytes] and its format's name.

The value of a weight is, in float32 and in this order::

    w = float(u + low) * scale - minimum

u: the stored code, 0 .. 2^bits - 1. scale and minimum belong to `group` consecutive k of a row.
One tensor a matrix, scales beside the codes, so that every pass, recipe and file treats it as
any other weight: rows can be concatenated, gathered and counted. Names: "int4_g32_f16" (low = -8),
"uint4_g32_f16_min_f16" (low = 0), "int6_g16_k", "uint4_g128_f16_min_zero".

"e4m3_g128_f32": u is the bits of an 8-bit float (OCP E4M3: 4 bits of exponent, 3 of mantissa, up
to 448, no infinity), w = float(u) * scale; for GPUs that multiply such numbers.

scale: f16, bf16, f32: stored so; k: an int8 a group times an f16 a 256 values (the float32 product
is exact). minimum: none; f16, bf16, f32; k: a uint8 a group times an f16 a 256 values; zero: a
uint8 zero point a group, minimum = zero * scale. What people already have maps without loss::

    GGUF Q8_0  int8_g32_f16             GGUF Q4_K  uint4_g32_k_min_k
    GGUF Q4_0  int4_g32_f16             GGUF Q5_K  uint5_g32_k_min_k
    GGUF Q4_1  uint4_g32_f16_min_f16    GGUF Q6_K  int6_g16_k
               (minimum = -m)           GPTQ, AWQ  uint4_g128_f16_min_zero; symmetric int4_g128_f16
    compressed-tensors  int4_g*_bf16, int8_g*_bf16; a channel's scale is repeated for groups of 128

A row is a sequence of super-blocks (256 values in formats with a k, else one group):
[f16 scale if k][f16 minimum if k], then a group's [codes][scale][minimum] each. Codes come in units
of four bytes, byte j of a unit for k + j; c counts units of four k:

    8 bits: a unit is u(c).                         4 bits: u(c) | u(c + 1) << 4, c even.
    6 bits: 16 k are two 4-bit units, then one with bits 4-5 of u(c + i) at bit 2 i, i = 0..3.
    5 bits: 32 k are four 4-bit units, then one with bit 4 of u(c + i) at bit i, i = 0..7.

ir/quantized.py makes rows from codes and scales (pack_fields), and back. Torch-free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

SUPER_BLOCK = 256  # values under one f16 in formats with a k: llama.cpp's QK_K
GROUPS = (128, 64, 32)  # of formats that weights are quantised to, the largest first
SIZES = {"f16": 2, "bf16": 2, "f32": 4, "k": 1, "zero": 1, "": 0}
UNIT_DEPTH = {8: 4, 4: 8, 6: 16, 5: 32}  # values whose codes fill whole units
SHORT_NAMES = {"int8": "int8_g32_f16", "int4": "int4_g32_f16", "fp8": "e4m3_g128_f32"}
E4M3_MAX = 448.0  # the largest number of OCP's 8-bit float with 3 bits of mantissa
_NAME = re.compile(
    r"(u?)int([4568])_g(16|32|64|128)_(f16|bf16|f32|k)(?:_min_(f16|bf16|f32|k|zero))?"
)
_FLOAT = re.compile(r"e4m3_g(32|64|128)_(f16|bf16|f32)")


@dataclass(frozen=True)
class Field:
    """Bytes [begin, end) of a super-block: codes, or one scale or minimum.

    dtype: "codes", "f16", "bf16", "f32", or "byte". unit: the bytes that belong together.
    """

    begin: int
    end: int
    dtype: str

    @property
    def unit(self) -> int:
        return 4 if self.dtype == "codes" else self.end - self.begin


@dataclass(frozen=True)
class QuantFormat:
    """bits: 4, 5, 6 or 8. group: values a scale. low: the code of u = 0. See the module's text.

    is_float: codes are the bits of e4m3 numbers, not whole numbers.
    """

    bits: int
    group: int
    low: int
    scales: str
    minimums: str = ""
    is_float: bool = False

    @staticmethod
    def parse(name: str) -> QuantFormat:
        """Return the format of a name. Raises ValueError that says what a name looks like."""
        if floats := _FLOAT.fullmatch(name):
            return QuantFormat(8, int(floats[1]), 0, floats[2], is_float=True)
        found = _NAME.fullmatch(name)
        bits = int(found[2]) if found else 0
        if not found or int(found[3]) % UNIT_DEPTH[bits]:
            raise ValueError(f"{name!r} is no quantised format (such as int4_g32_f16)")
        low = 0 if found[1] else -(1 << (bits - 1))
        return QuantFormat(bits, int(found[3]), low, found[4], found[5] or "")

    @property
    def name(self) -> str:
        if self.is_float:
            return f"e4m3_g{self.group}_{self.scales}"
        sign = "" if self.low else "u"
        minimum = f"_min_{self.minimums}" if self.minimums else ""
        return f"{sign}int{self.bits}_g{self.group}_{self.scales}{minimum}"

    @property
    def can_quantize(self) -> bool:
        """Whether weights can be quantised to it here (every format can be run)."""
        if self.is_float:
            return True
        floats = self.scales != "k" and self.minimums not in ("k", "zero")
        return floats and self.bits in (4, 8) and bool(self.minimums) == (self.low == 0)

    @property
    def span(self) -> int:
        """The values of a super-block."""
        return SUPER_BLOCK if "k" in (self.scales, self.minimums) else self.group

    @property
    def header_bytes(self) -> int:
        return 2 * (self.scales == "k") + 2 * (self.minimums == "k")

    @property
    def code_bytes(self) -> int:
        """The bytes of a group's codes."""
        return self.group * self.bits // 8

    @property
    def group_bytes(self) -> int:
        return self.code_bytes + SIZES[self.scales] + SIZES[self.minimums]

    @property
    def span_bytes(self) -> int:
        return self.header_bytes + self.span // self.group * self.group_bytes

    def fitting(self, depth: int) -> QuantFormat | None:
        """Return the format with the largest group, up to this one's, that cuts rows of `depth`
        values; None where not even groups of 32 do (or of the format itself, with super-blocks).
        """
        if depth % self.span == 0:
            return self
        groups = (g for g in GROUPS if g < self.group and depth % g == 0)
        group = next(groups, 0) if self.span == self.group else 0
        return replace(self, group=group) if group else None

    def row_bytes(self, depth: int) -> int:
        """Return the bytes of a row of `depth` values, a multiple of `span`."""
        assert depth % self.span == 0, f"{self.name}: {depth} is no multiple of {self.span}"
        return depth // self.span * self.span_bytes

    def depth(self, row_bytes: int) -> int:
        """Return the values of a row of so many bytes."""
        assert row_bytes % self.span_bytes == 0, f"{self.name}: no row has {row_bytes} bytes"
        return row_bytes // self.span_bytes * self.span

    def fields(self) -> list[Field]:
        """Return the fields of a super-block, in order."""
        found: list[Field] = []
        stored = {"k": "byte", "zero": "byte"}
        group = [("codes", self.code_bytes)]
        for kind in (self.scales, self.minimums):
            group += [(stored.get(kind, kind), SIZES[kind])]
        heads = [("f16", 2 * (kind == "k")) for kind in (self.scales, self.minimums)]
        for dtype, size in (*heads, *group * (self.span // self.group)):
            if size:
                begin = found[-1].end if found else 0
                found.append(Field(begin, begin + size, dtype))
        return found
