"""GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum): what `quant_method: gptq` means by its tensors.

    qweight  int32 [K * bits / 32, N]    codes of 32 / bits consecutive k in a word
    qzeros   int32 [G, N * bits / 32]    zero points; in the format "gptq" one too small
    scales   float [G, N]
    g_idx    int32 [K]                   the group of each k (act-order); may be absent

In the format "gptq" (v1) 1 was taken from every zero point, as one subtraction from the words, and
is put back as one addition (gptqmodel: convert_gptq_v1_to_v2_format_module); "gptq_v2" stores them
as they are. GPTQModel's `dynamic` gives layers bits and groups of their own by regular expressions;
the tensors' shapes say the same, and no expression of a folder is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.checkpoint.packed_matrix import (
    BITS,
    SCALE_DTYPES,
    Codes,
    PackedLayout,
    PackedMatrix,
    check_bits,
    check_group,
    floats_of,
    matrix_of,
    part,
    read_group_index,
    unpack,
)
from aios_compile.checkpoint.weights import WeightFiles
from aios_compile.errors import UnsupportedModelError

ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}


class GptqMatrix:
    """One linear layer's weight."""

    def __init__(self, weights: WeightFiles, stem: str, layout: PackedLayout, v1: bool) -> None:
        self.layout = layout
        self._weights = weights
        self._stem = stem
        self._v1 = v1

    def codes(self, begin: int, end: int) -> Codes:
        words = self._weights.read(f"{self._stem}.qweight")[:, begin:end]
        return np.ascontiguousarray(unpack(words, self.layout.bits, axis=0).T)

    def scales(self, begin: int, end: int) -> NDArray[Any]:
        return floats_of(self._weights, f"{self._stem}.scales")[:, begin:end].T

    def zeros(self, begin: int, end: int) -> Codes:
        words = self._weights.read(f"{self._stem}.qzeros").view(np.uint32)
        words = words + ONES[self.layout.bits] if self._v1 else words
        return unpack(words, self.layout.bits, axis=1)[:, begin:end].T

    def group_of_column(self) -> NDArray[np.int64] | None:
        if "order" not in self.layout.parts:
            return None
        return read_group_index(self._weights, f"{self._stem}.g_idx", self.layout)


def find_gptq(
    weights: WeightFiles, settings: Mapping[str, Any], where: str
) -> dict[str, PackedMatrix]:
    """Return the quantised weights by their names' stems ("model.layers.0.mlp.up_proj")."""
    kind = settings.get("checkpoint_format", settings.get("format", "gptq"))
    if settings.get("is_marlin_format"):
        kind = "marlin"
    if kind not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(
            f"{where}: checkpoint_format {repr(kind)[:40]} is not implemented, known: gptq, gptq_v2"
        )
    bits = check_bits(settings.get("bits"), where)
    group = check_group(settings.get("group_size", -1), where)
    found: dict[str, PackedMatrix] = {}
    for name in weights.names():
        stem, _, ending = name.rpartition(".")
        if ending == "qweight":
            own = _own_scheme(weights, stem, bits, group) if settings.get("dynamic") else None
            layout = _layout(weights, stem, *own or (bits, group))
            found[stem] = GptqMatrix(weights, stem, layout, kind == "gptq")
    return found


def _own_scheme(weights: WeightFiles, stem: str, bits: int, group: int) -> tuple[int, int]:
    """Return the bits and the group that the shapes of a layer's tensors mean; the settings' where
    those fit, or where nothing does.
    """
    words, rows = matrix_of(weights, f"{stem}.qweight")
    num_groups, zero_words = matrix_of(weights, f"{stem}.qzeros")
    for own in (bits, *BITS):
        columns = words * 32 // own
        if -(-rows * own // 32) != zero_words:
            continue
        if num_groups == (1 if group == -1 else -(-columns // group)):
            return own, group
        if columns % num_groups == 0:
            return own, columns // num_groups
    return bits, group


def _layout(weights: WeightFiles, stem: str, bits: int, group: int) -> PackedLayout:
    words, rows = matrix_of(weights, f"{stem}.qweight")
    columns = words * 32 // bits
    group = columns if group == -1 else group
    num_groups = -(-columns // group)
    zero_words = -(-rows * bits // 32)
    parts = {
        "codes": weights.info(f"{stem}.qweight"),
        "scales": part(weights, f"{stem}.scales", SCALE_DTYPES, (num_groups, rows)),
        "zeros": part(weights, f"{stem}.qzeros", ("I32",), (num_groups, zero_words)),
    }
    if f"{stem}.g_idx" in weights:
        parts["order"] = part(weights, f"{stem}.g_idx", ("I32",), (columns,))
    return PackedLayout(f"GPTQ int{bits}", rows, columns, bits, group, parts)
