"""A matrix that is stored as integer codes, several in an int32, with scales and zero points.

N rows (outputs), K columns (inputs), G groups of columns with a scale each. What each format means
by its tensors stands in gptq.py, awq.py and compressed_tensors.py; all of them come down to

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]        g: the group of column k

in integers and one float32 product, which is exact for scales of float16 and bfloat16. The
formats' own code computes it in the scale's dtype: equal to this, rounded to that dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aios_compile.checkpoint.safetensors_header import TensorInfo
from aios_compile.checkpoint.tensors import StoredFields
from aios_compile.checkpoint.weights import WeightFiles
from aios_compile.errors import CheckpointError, UnsupportedModelError

Codes = NDArray[np.uint8]
BITS = (4, 8)
STORED_GROUPS = (128, 64, 32)  # of ir/quant_format.py, the largest first
SCALE_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class PackedLayout:
    """What is known of a matrix from headers alone. parts: the tensors' infos by role."""

    format: str  # for people, e.g. "GPTQ int4"
    rows: int
    columns: int
    bits: int
    group: int  # columns a scale; the last group may be short
    parts: Mapping[str, TensorInfo]

    @property
    def num_groups(self) -> int:
        return -(-self.columns // self.group)

    @property
    def num_bytes(self) -> int:
        return sum(info.end - info.begin for info in self.parts.values())


class PackedMatrix(Protocol):
    """One quantised weight; nothing is read before it is asked for."""

    layout: PackedLayout

    def codes(self, begin: int, end: int) -> Codes:
        """Return the codes of rows [begin, end): uint8 [n, K]."""
        ...

    def scales(self, begin: int, end: int) -> NDArray[Any]:
        """Return float16 or float32, or bfloat16 as float32: [n, G]."""
        ...

    def zeros(self, begin: int, end: int) -> Codes | None:
        """Return the codes that mean zero, uint8 [n, G]; None for half of the range throughout."""
        ...

    def group_of_column(self) -> NDArray[np.int64] | None:
        """Return the group of each column [K]; None where groups are runs of `group` columns."""
        ...


def dequantize_rows(matrix: PackedMatrix, begin: int, end: int) -> NDArray[np.float32]:
    """Return the weights of rows [begin, end) in float32 [n, K]."""
    layout = matrix.layout
    index = matrix.group_of_column()
    if index is None:
        index = np.arange(layout.columns) // layout.group
    values = matrix.codes(begin, end).astype(np.int16)
    zeros = matrix.zeros(begin, end)
    values -= (
        np.int16(1 << (layout.bits - 1)) if zeros is None else zeros.astype(np.int16)[:, index]
    )
    floats: NDArray[np.float32] = values.astype(np.float32)
    with np.errstate(invalid="ignore"):  # an infinite scale is found when weights are packed
        floats *= matrix.scales(begin, end).astype(np.float32)[:, index]
    return floats


def stored_form(matrix: PackedMatrix) -> str:
    """Return the format of ir/quant_format.py that holds the same values, "" for none.

    Where columns are shuffled among the groups (act-order), it holds them sorted by group: see
    column_order. None holds a zero point with float32 scales, whose product would be rounded twice,
    nor shuffled groups of uneven sizes.
    """
    layout = matrix.layout
    group = _stored_group(layout)
    if not group or not _has_even_groups(matrix):
        return ""
    scales = layout.parts["scales"].dtype.lower()
    if _is_symmetric(matrix):
        return f"int{layout.bits}_g{group}_{scales}"
    return "" if scales == "f32" else f"uint{layout.bits}_g{group}_{scales}_min_zero"


def stored_fields(matrix: PackedMatrix, form: str, begin: int, end: int) -> StoredFields:
    """Return rows [begin, end) in the format `form`, which stored_form gave."""
    layout = matrix.layout
    group = _stored_group(layout)
    index = np.arange(layout.columns // group) * group // layout.group
    zeros = matrix.zeros(begin, end) if form.endswith("_min_zero") else None
    scales, codes = matrix.scales(begin, end)[:, index], matrix.codes(begin, end)
    order = column_order(matrix)
    return StoredFields(
        codes if order is None else codes[:, order],
        scales,
        None if zeros is None else zeros[:, index],
    )


def column_order(matrix: PackedMatrix) -> NDArray[np.int32] | None:
    """Return the columns sorted by group, those of one in their order; None where they are."""
    groups = matrix.group_of_column()
    return None if groups is None else np.argsort(groups, kind="stable").astype(np.int32)


def _has_even_groups(matrix: PackedMatrix) -> bool:
    """Say whether sorted groups are runs of `group` columns; the last one may be short."""
    layout, groups = matrix.layout, matrix.group_of_column()
    return groups is None or np.array_equal(
        np.sort(groups), np.arange(layout.columns) // layout.group
    )


def _stored_group(layout: PackedLayout) -> int:
    """Return the largest group that cuts both the rows and the groups of a matrix, 0 for none."""
    for group in STORED_GROUPS:
        if layout.columns % group == 0 and layout.group % group == 0:
            return group
    return 0


def _is_symmetric(matrix: PackedMatrix) -> bool:
    layout = matrix.layout
    zeros = matrix.zeros(0, layout.rows)
    return zeros is None or bool(np.all(zeros == 1 << (layout.bits - 1)))


def unpack(words: NDArray[Any], bits: int, axis: int) -> Codes:
    """Return the codes in int32 words, lowest bits first, along `axis` (0 or 1) of a matrix."""
    words = np.ascontiguousarray(words.T if axis == 0 else words)
    data = words.view(np.uint8).reshape(len(words), -1)
    if bits == 4:
        data = np.stack((data & 0xF, data >> 4), axis=-1).reshape(len(data), -1)
    return np.ascontiguousarray(data.T) if axis == 0 else data


def floats_of(weights: WeightFiles, name: str) -> NDArray[Any]:
    """Return a tensor of scales; bfloat16 as float32."""
    array = weights.read(name)
    if weights.info(name).dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def part(
    weights: WeightFiles, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> TensorInfo:
    """Return the info of a tensor that must have one of the dtypes and the shape."""
    info = weights.info(name)
    if info.dtype not in dtypes or info.shape != shape:
        raise CheckpointError(
            f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}, expected "
            f"{' or '.join(dtypes)} {list(shape)}"
        )
    return info


def matrix_of(weights: WeightFiles, name: str) -> tuple[int, int]:
    """Return the shape of an int32 tensor of two dimensions."""
    info = weights.info(name)
    if info.dtype != "I32" or len(info.shape) != 2 or 0 in info.shape:
        raise CheckpointError(
            f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}, expected I32 of two "
            "dimensions"
        )
    return info.shape[0], info.shape[1]


def read_group_index(
    weights: WeightFiles, name: str, layout: PackedLayout
) -> NDArray[np.int64] | None:
    """Return the group of each column, int64 [columns]; None where groups are runs of columns.

    Raises CheckpointError for a group that does not exist.
    """
    index = weights.read(name).astype(np.int64)
    if index.size and not 0 <= index.min() <= index.max() < layout.num_groups:
        raise CheckpointError(
            f"{weights.info(name).file}: tensor {name!r} names groups from {index.min()} to "
            f"{index.max()}, there are {layout.num_groups}"
        )
    regular = np.arange(layout.columns) // layout.group
    return None if np.array_equal(index, regular) else index


def check_bits(value: Any, where: str) -> int:
    """Return a number of bits that is implemented."""
    if isinstance(value, bool) or value not in BITS:
        raise UnsupportedModelError(
            f"{where}: weights of {repr(value)[:20]} bits are not implemented, known: 4, 8"
        )
    return int(value)


def check_group(value: Any, where: str) -> int:
    """Return a group size, -1 for a whole row."""
    if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or value >= 8):
        raise CheckpointError(f"{where}: group_size is {repr(value)[:20]}, expected -1 or 8 and up")
    return value
