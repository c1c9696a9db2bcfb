"""AWQ checkpoints (AutoAWQ's "GEMM" version): what `quant_method: awq` means by its tensors.

    qweight  int32 [K, N / 8]    8 consecutive n in a word, in the order of ORDER
    qzeros   int32 [K / group, N / 8]    zero points, in the same order
    scales   float [K / group, N]

ORDER is that of AutoAWQ's kernels: the i-th four bits of a word belong to n + ORDER[i].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.checkpoint.packed_matrix import (
    SCALE_DTYPES,
    Codes,
    PackedLayout,
    PackedMatrix,
    check_group,
    floats_of,
    matrix_of,
    part,
    unpack,
)
from aios_compile.checkpoint.weights import WeightFiles
from aios_compile.errors import CheckpointError, UnsupportedModelError

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = [ORDER.index(n) for n in range(8)]  # where in a word the code of n + i stands


class AwqMatrix:
    """One linear layer's weight."""

    def __init__(self, weights: WeightFiles, stem: str, layout: PackedLayout) -> None:
        self.layout = layout
        self._weights = weights
        self._stem = stem

    def codes(self, begin: int, end: int) -> Codes:
        return self._in_order("qweight", begin, end)

    def scales(self, begin: int, end: int) -> NDArray[Any]:
        return floats_of(self._weights, f"{self._stem}.scales")[:, begin:end].T

    def zeros(self, begin: int, end: int) -> Codes:
        return self._in_order("qzeros", begin, end)

    def group_of_column(self) -> None:
        return None

    def _in_order(self, ending: str, begin: int, end: int) -> Codes:
        """Return rows [begin, end) of the codes, from whole words."""
        first, last = begin // 8, -(-end // 8)
        words = self._weights.read(f"{self._stem}.{ending}")[:, first:last]
        codes = unpack(words, 4, axis=1).reshape(len(words), -1, 8)[:, :, _PLACE]
        rows = codes.reshape(len(words), -1).T
        return np.ascontiguousarray(rows[begin - 8 * first : end - 8 * first])


def find_awq(
    weights: WeightFiles, settings: Mapping[str, Any], where: str
) -> dict[str, PackedMatrix]:
    """Return the quantised weights by their names' stems."""
    kind = settings.get("version", settings.get("format", "gemm"))
    if not isinstance(kind, str) or kind.lower() != "gemm":
        raise UnsupportedModelError(
            f"{where}: AWQ version {repr(kind)[:40]} is not implemented, known: gemm"
        )
    bits = settings.get("bits", settings.get("w_bit"))
    if bits != 4:
        raise UnsupportedModelError(f"{where}: AWQ of {repr(bits)[:20]} bits is not implemented")
    if settings.get("zero_point", True) is not True:
        raise UnsupportedModelError(f"{where}: AWQ with zero_point false is not implemented")
    group = check_group(settings.get("group_size", settings.get("q_group_size")), where)
    found: dict[str, PackedMatrix] = {}
    for name in weights.names():
        stem, _, ending = name.rpartition(".")
        if ending == "qweight":
            found[stem] = AwqMatrix(weights, stem, _layout(weights, stem, group))
    return found


def _layout(weights: WeightFiles, stem: str, group: int) -> PackedLayout:
    columns, words = matrix_of(weights, f"{stem}.qweight")
    rows = words * 8
    group = columns if group == -1 else group
    if columns % group:
        raise CheckpointError(
            f"{weights.info(f'{stem}.qweight').file}: tensor {stem + '.qweight'!r} has {columns} "
            f"inputs, no multiple of group_size {group}"
        )
    parts = {
        "codes": weights.info(f"{stem}.qweight"),
        "scales": part(weights, f"{stem}.scales", SCALE_DTYPES, (columns // group, rows)),
        "zeros": part(weights, f"{stem}.qzeros", ("I32",), (columns // group, words)),
    }
    return PackedLayout("AWQ int4", rows, columns, 4, group, parts)
