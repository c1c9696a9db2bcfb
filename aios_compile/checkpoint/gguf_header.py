"""Parse and check the header of a GGUF file before anything of its data is read.

Layout (little endian; the specification is ggml's docs/gguf.md): magic "GGUF", version 2 or 3, the
number of tensors and of metadata entries, the entries (key, type, value), one record a tensor
(name, sizes from the innermost out, type, offset), padding to `general.alignment`, the data.
The tensors must tile the data: a truncated file that is mapped reads as zeros, not as an error.

Read here and not with the gguf package, which checks no extent, lets numpy's errors out and takes
ten seconds for the vocabulary of a Llama 3; it is the oracle of the tests.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aios_compile.checkpoint.gguf_blocks import BLOCK_TYPES, FLOAT_TYPES, GGML_TYPES
from aios_compile.checkpoint.safetensors_header import TensorInfo
from aios_compile.errors import CheckpointError, UnsupportedModelError

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 64 << 20  # a vocabulary of 260,000 tokens with its merges takes 16 MB
MAX_ENTRIES = 1 << 16  # metadata entries, and tensors
MAX_ITEMS = 1 << 20  # of one array
MAX_STRING_BYTES = 4 << 20
MAX_NAME_BYTES = 64  # of a tensor, by the specification
MAX_DIMS = 4
SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key (numbers, bools, strings; numeric arrays as numpy, strings as a list), and
    where each tensor lies. A tensor's dtype is ggml's name, e.g. "Q4_K"; shapes are row-major.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_gguf_header(path: Path) -> GgufHeader:
    """Return the header of a file. Raises CheckpointError, or UnsupportedModelError for a version
    or tensor type that is not implemented.
    """
    try:
        with path.open("rb") as file:
            return _read(_Cursor(path, file))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


class _Cursor:
    """Takes bytes from the file's begin on; nothing beyond the file or the header's limit."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.file_bytes = os.fstat(file.fileno()).st_size
        self.position = 0

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > self.file_bytes:
            raise CheckpointError(
                f"{self.path}: truncated: the header needs {end} bytes, the file has "
                f"{self.file_bytes}"
            )
        if end > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path}: header of over {MAX_HEADER_BYTES} bytes, the limit for a header"
            )
        data = self.file.read(num_bytes)
        if len(data) != num_bytes:
            raise CheckpointError(f"{self.path}: truncated while it was read")
        self.position = end
        return data

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self, what: str, max_bytes: int = MAX_STRING_BYTES) -> str:
        size = self.number("Q")
        if size > max_bytes:
            raise CheckpointError(f"{self.path}: {what} of {size} bytes, at most {max_bytes}")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8") from None

    def count(self, what: str, least_bytes: int, most: int) -> int:
        """Return a number of things, each of at least `least_bytes` in the rest of the file."""
        count = int(self.number("Q"))
        if count > most or count * least_bytes > self.file_bytes - self.position:
            raise CheckpointError(
                f"{self.path}: {count} {what}, at most {most} and no more than the file holds"
            )
        return count


def _read(cursor: _Cursor) -> GgufHeader:
    path = cursor.path
    _check_version(cursor)
    num_tensors = cursor.count("tensors", 8 + 4 + 4 + 8, MAX_ENTRIES)
    num_entries = cursor.count("metadata entries", 8 + 4 + 1, MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.text("a metadata key", 65535)
        if key in metadata:
            raise CheckpointError(f"{path}: the metadata key {key!r} stands twice")
        metadata[key] = _value(cursor, key)
    records: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(num_tensors):
        name = cursor.text("a tensor's name", MAX_NAME_BYTES)
        if name in records:
            raise CheckpointError(f"{path}: tensor {name!r} stands twice")
        records[name] = _record(cursor, name)
    tensors = _place(cursor, records, _alignment(path, metadata))
    return GgufHeader(path, metadata, tensors)


def _check_version(cursor: _Cursor) -> None:
    if cursor.file_bytes < 24 or cursor.take(4) != MAGIC:
        raise CheckpointError(f"{cursor.path}: not a GGUF file (it does not begin with GGUF)")
    version = cursor.number("I")
    if version in (2, 3):
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    kind = f"big-endian GGUF, version {swapped}" if swapped in (2, 3) else f"GGUF version {version}"
    raise UnsupportedModelError(
        f"{cursor.path}: {kind} is not implemented, known: little-endian versions 2 and 3",
        advice="convert the model again with a current llama.cpp",
    )


def _value(cursor: _Cursor, key: str) -> Any:
    what = f"metadata {key!r}"
    kind = cursor.number("I")
    if kind in SCALARS:
        return cursor.number(SCALARS[kind])
    if kind == BOOL:
        flag = cursor.number("B")
        if flag > 1:
            raise CheckpointError(f"{cursor.path}: {what} is a bool with the value {flag}")
        return bool(flag)
    if kind == STRING:
        return cursor.text(what)
    if kind != ARRAY:
        raise CheckpointError(f"{cursor.path}: {what} has the unknown type {kind}")
    return _array(cursor, what)


def _array(cursor: _Cursor, what: str) -> Any:
    kind = cursor.number("I")
    if kind == STRING:
        return [cursor.text(what) for _ in range(cursor.count(f"items in {what}", 8, MAX_ITEMS))]
    if kind != BOOL and kind not in SCALARS:
        raise CheckpointError(f"{cursor.path}: {what} is an array of the type {kind}")
    dtype = np.dtype("u1" if kind == BOOL else "<" + SCALARS[kind])
    count = cursor.count(f"items in {what}", dtype.itemsize, MAX_ITEMS)
    return np.frombuffer(cursor.take(count * dtype.itemsize), dtype)


def _record(cursor: _Cursor, name: str) -> tuple[str, tuple[int, ...], int]:
    where = f"{cursor.path}: tensor {name!r}"
    num_dims = cursor.number("I")
    if num_dims > MAX_DIMS:
        raise CheckpointError(f"{where} has {num_dims} dimensions, at most {MAX_DIMS} allowed")
    sizes = [int(cursor.number("Q")) for _ in range(num_dims)]
    if any(not 0 < size < 1 << 63 for size in sizes):
        raise CheckpointError(f"{where} has the sizes {sizes}")
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in GGML_TYPES:
        raise CheckpointError(f"{where} has the unknown type {kind}")
    return GGML_TYPES[kind], tuple(reversed(sizes)), offset


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    good = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not good or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise CheckpointError(
            f"{path}: general.alignment is {repr(alignment)[:40]}, expected a power of two from 8"
        )
    return int(alignment)


def _place(
    cursor: _Cursor, records: Mapping[str, tuple[str, tuple[int, ...], int]], alignment: int
) -> dict[str, TensorInfo]:
    """Return where the tensors lie; raise unless they tile the rest of the file."""
    path, tensors = cursor.path, {}
    start = position = _align(cursor.position, alignment)
    for name, (dtype, shape, offset) in sorted(records.items(), key=lambda item: item[1][2]):
        begin = start + offset
        if begin != position:
            kind = "overlaps another tensor" if begin < position else "follows a hole"
            raise CheckpointError(
                f"{path}: tensor {name!r} {kind}: begins at byte {begin}, expected {position}"
            )
        end = begin + _num_bytes(path, name, dtype, shape)
        if end > cursor.file_bytes:
            raise CheckpointError(
                f"{path}: truncated: tensor {name!r} ends at byte {end}, the file has "
                f"{cursor.file_bytes}"
            )
        tensors[name] = TensorInfo(path, dtype, shape, begin, end)
        position = _align(end, alignment)
    if tensors and cursor.file_bytes > position:
        raise CheckpointError(f"{path}: {cursor.file_bytes - position} bytes after the last tensor")
    return {name: tensors[name] for name in records}


def _num_bytes(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> int:
    num_items = math.prod(shape)
    if dtype in FLOAT_TYPES:
        return num_items * FLOAT_TYPES[dtype]
    if dtype not in BLOCK_TYPES:
        raise UnsupportedModelError(
            f"{path}: tensor {name!r} has the type {dtype}, which is not implemented, known: "
            f"{', '.join((*FLOAT_TYPES, *BLOCK_TYPES))}",
            advice="take the Q4_K_M, Q8_0 or another file of these types of the same model",
        )
    block = BLOCK_TYPES[dtype]
    if not shape or shape[-1] % block.num_weights:
        raise CheckpointError(
            f"{path}: tensor {name!r} of the shape {list(shape)} has rows that are no multiple of "
            f"the {block.num_weights} weights in a block of {dtype}"
        )
    return num_items // block.num_weights * block.num_bytes


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
