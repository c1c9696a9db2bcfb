"""Parse and check the header of a safetensors file before anything of it is mapped.

Layout: 8 bytes, the header's size N (little endian); N bytes of JSON; the data. The extents must
tile the data exactly: a truncated file that is mapped reads as zeros, not as an error.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios_compile.checkpoint.json_file import parse_json
from aios_compile.errors import CheckpointError

MAX_HEADER_BYTES = 16 << 20  # 170,000 tensors; parsing that many takes 2 s and 250 MB
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes [begin, end) of `file`, row-major, little endian."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file by name. Raises CheckpointError; maps nothing."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > file_bytes - 8:
                raise CheckpointError(
                    f"{path}: truncated: {file_bytes} bytes, the header alone needs "
                    f"{8 + header_bytes}"
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} allowed"
                )
            header = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    entries = parse_json(header, f"{path}: header")
    entries.pop("__metadata__", None)
    start = 8 + header_bytes
    tensors = {name: _entry(path, name, entry, start) for name, entry in entries.items()}
    _check_extents(path, tensors, start, file_bytes)
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: header entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{where}: unknown dtype {repr(dtype)[:40]}, known: {', '.join(ITEM_BYTES)}"
        )
    if not _is_sizes(shape) or len(shape) > 16:
        raise CheckpointError(f"{where}: shape {repr(shape)[:80]} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {repr(offsets)[:80]} are not [begin, end]")
    need, got = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if need != got:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} takes {need} bytes, data_offsets give {got}"
        )
    return TensorInfo(path, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_sizes(value: Any) -> bool:
    """Say whether value is a list of whole numbers from 0 to 2^63 - 1."""
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 63
        for size in value
    )


def _check_extents(path: Path, tensors: dict[str, TensorInfo], start: int, end: int) -> None:
    """Raise unless the tensors tile [start, end) of the file without holes or overlaps."""
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            kind = "overlaps another tensor" if info.begin < position else "follows a hole"
            raise CheckpointError(
                f"{path}: tensor {name!r} {kind}: begins at byte {info.begin}, expected {position}"
            )
        position = info.end
        if position > end:
            raise CheckpointError(
                f"{path}: truncated: tensor {name!r} ends at byte {position}, the file has {end}"
            )
    if position != end:
        raise CheckpointError(f"{path}: {end - position} bytes after the last tensor")
