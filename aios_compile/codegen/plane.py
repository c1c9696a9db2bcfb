"""Where the parts of a quantised row lie on a GPU; the bytes are planar.py's. Torch-free.

planar.<format>: a row's codes, then its scales, then its minimums, each at a multiple of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from aios_compile.ir.quant_format import SIZES, QuantFormat

PREFIX = "planar."
FLOATS = ("f16", "bf16", "f32")  # of scales and minimums that are stored as they are


def planar_row_bytes(packed: str, row_bytes: int) -> int:
    """Return the bytes of a row in the layout `packed`, of `row_bytes` in its format."""
    form = QuantFormat.parse(packed.removeprefix(PREFIX))
    return plane_of(form, form.depth(row_bytes)).row_bytes


@dataclass(frozen=True)
class Plane:
    """Where the parts of a row of `depth` values lie. bits: 4 or 8. minimum_dtype: "" for none."""

    depth: int
    bits: int
    group: int
    low: int
    scale_dtype: str
    minimum_dtype: str
    is_float: bool = False

    @property
    def scale_begin(self) -> int:
        return _aligned(self.depth * self.bits // 8)

    @property
    def minimum_begin(self) -> int:
        return _aligned(self.scale_begin + self._plane_bytes(self.scale_dtype))

    @property
    def row_bytes(self) -> int:
        return _aligned(self.minimum_begin + self._plane_bytes(self.minimum_dtype))

    def _plane_bytes(self, dtype: str) -> int:
        return SIZES[dtype] * self.depth // self.group if dtype else 0


def plane_of(form: QuantFormat, depth: int) -> Plane:
    """Return the layout of a format's rows of `depth` values, a multiple of 32."""
    scale = form.scales if form.scales in FLOATS else "f32"
    minimum = form.minimums if form.minimums in FLOATS or not form.minimums else "f32"
    return Plane(
        depth, 4 if form.bits == 4 else 8, form.group, form.low, scale, minimum, form.is_float
    )


def _aligned(size: int) -> int:
    return -(-size // 16) * 16
