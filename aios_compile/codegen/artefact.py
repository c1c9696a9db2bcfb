"""The compiled artefact: one folder that a later start maps without torch.

::

    manifest.json      format, key, size and sha256 of every file
    program.json       the flat list of launches           plan.json         the memory plan
    certificates.json  what the runner proved              report.json       the pass table
    quantization.json  bits and error of each quantised weight, where there are some
    kernel_choices.json  what select_kernels measured and chose, where there was a choice
    kernels/*.cpp      one file a kernel, for reading      step.cpp          all of them in one step
    lib.so             what is called                      tokenizer/        as in the checkpoint
    kernels/*.py       on the Triton target, which has launches.txt and an empty lib.so
    triton/            its compiled kernels, as Triton's cache keeps them
    weights.json       name, dtype, shape, offset of each tensor; checksum of weights.bin
    weights.bin        packed tensors, each at a multiple of 64 bytes, padded with zeros

Nothing here runs or unpickles anything: JSON, plain bytes, and a library whose sha256 was checked.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from aios_compile.codegen.aligned_map import HUGE_PAGE, map_aligned
from aios_compile.codegen.checksum import Checksum, checksum_buffer
from aios_compile.codegen.kernel_choices import FILE, NO_CHOICES, KernelChoices
from aios_compile.codegen.manifest import WEIGHTS, Manifest, canonical, damaged, open_folder
from aios_compile.codegen.private_folder import cache_errors

ALIGNMENT = 64
PROGRAM, PLAN = "program.json", "plan.json"
CERTIFICATES, REPORT = "certificates.json", "report.json"
QUANTIZATION = "quantization.json"
LIBRARY, STEP, TENSORS = "lib.so", "step.cpp", "weights.json"
LAUNCHES = "launches.txt"  # of the Triton target, instead of step.cpp
KERNELS, TOKENIZER = "kernels", "tokenizer"
_MAX_JSON_BYTES = 1 << 30

# How a stored dtype is seen in numpy, which has no bfloat16: its bits as uint16.
NUMPY_DTYPES = {
    "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int64": "<i8", "int32": "<i4",
    "int16": "<i2", "int8": "i1", "uint8": "u1", "uint16": "<u2", "float64": "<f8", "bool": "?",
}  # fmt: skip

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies in weights.bin. `offset` is in bytes, a multiple of ALIGNMENT."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize


class ArtefactWriter:
    """Fill a staging folder. Tensors go to the disk as they come; none is kept in memory.

    Owns its open file until `finish`. Errors: CacheError when the disk is full or not writable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records: list[TensorRecord] = []
        self._names: set[str] = set()
        self._offset = 0
        self._checksum = Checksum()
        self._kept = bytearray()  # of the last huge page
        with cache_errors(folder):
            # Closed by `finish`.
            self._file = open(folder / WEIGHTS, "xb", buffering=0)  # noqa: SIM115

    def add_tensor(self, name: str, array: Array, dtype: str | None = None) -> TensorRecord:
        """Append `array`; `dtype` says what the bits mean where numpy cannot (bfloat16)."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        dtype = dtype or array.dtype.name
        assert name not in self._names, f"tensor {name} was written already"
        assert np.dtype(NUMPY_DTYPES[dtype]) == array.dtype, f"{name}: {array.dtype} is no {dtype}"
        record = TensorRecord(name, dtype, tuple(map(int, array.shape)), self._offset)
        self._append(array.reshape(-1).view(np.uint8).data)
        self._append(memoryview(bytes(-self._offset % ALIGNMENT)))
        self._records.append(record)
        self._names.add(name)
        return record

    def _append(self, data: memoryview) -> None:
        """Write what fills whole huge pages and keep the rest: then the page cache uses them."""
        self._checksum.update(data)
        self._offset += len(data)
        whole = (len(self._kept) + len(data)) // HUGE_PAGE * HUGE_PAGE
        if not whole:
            self._kept += data
            return
        now, later = data[: whole - len(self._kept)], data[whole - len(self._kept) :]
        self._write([memoryview(self._kept), now])
        self._kept = bytearray(later)

    def _write(self, pieces: list[memoryview]) -> None:
        with cache_errors(self.folder / WEIGHTS):
            while pieces:
                count = os.writev(self._file.fileno(), pieces)
                while pieces and count >= len(pieces[0]):
                    count -= len(pieces.pop(0))
                if pieces:
                    pieces[0] = pieces[0][count:]

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` (ready for JSON) as the file `name`."""
        self.write_bytes(name, canonical(value))

    def write_text(self, name: str, text: str) -> None:
        """Write `text` as the file `name`, in UTF-8."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write `data` as the file `name`, a relative path with forward slashes."""
        path = self._path(name)
        with cache_errors(path):
            path.write_bytes(data)

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        assert parts and not {"..", "/", "."} & set(parts), f"bad name in an artefact: {name}"
        path = self.folder.joinpath(*parts)
        with cache_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    def finish(self) -> None:
        """Write the table of tensors and close the weights."""
        self._write([memoryview(self._kept)])
        self.close()
        tensors = [[r.name, r.dtype, list(r.shape), r.offset] for r in self._records]
        table = {"bytes": self._offset, "checksum": self._checksum.hex(), "tensors": tensors}
        self.write_json(TENSORS, table)

    def close(self) -> None:
        """Close the weights without finishing; the staging folder is of no use then."""
        self._file.close()


class Artefact:
    """An artefact that was opened: its parts are read when they are asked for.

    `weights` stay mapped until `close`; arrays from `tensor` must not outlive it.
    """

    def __init__(self, path: Path, manifest: Manifest, tensors: Iterable[TensorRecord]) -> None:
        self.path = path
        self.manifest = manifest
        self.tensors: Mapping[str, TensorRecord] = {t.name: t for t in tensors}
        self._mapped: tuple[mmap.mmap, int] | None = None

    @classmethod
    def open(cls, path: Path) -> Artefact:
        """Check versions, sizes and offsets and return the artefact; CacheError otherwise.

        `ArtefactCache.lookup` has hashed the files before; this reads no large file.
        """
        manifest = open_folder(path)
        for name in (PROGRAM, LIBRARY, TENSORS, WEIGHTS):
            if name not in manifest.files:
                raise damaged(path / name, "is missing")
        table = _read_json(path / TENSORS)
        try:
            size, checksum, rows = table["bytes"], table["checksum"], table["tensors"]
            records = [TensorRecord(n, d, tuple(s), o) for n, d, s, o in rows]
            _check_records(records, size)
        except (TypeError, ValueError, KeyError) as error:
            raise damaged(path / TENSORS, f"is not a table of tensors ({error})") from error
        got = manifest.files[WEIGHTS].bytes
        if got != size:
            raise damaged(path / WEIGHTS, f"has {got} bytes, expected {size}")
        artefact = cls(path, manifest, records)
        artefact._checksum, artefact._num_bytes = checksum, size
        return artefact

    @classmethod
    def unsealed(cls, path: Path) -> Artefact:
        """Return an artefact that this process has just written and that has no manifest yet."""
        table = _read_json(path / TENSORS)
        records = [TensorRecord(n, d, tuple(s), o) for n, d, s, o in table["tensors"]]
        artefact = cls(path, Manifest("", {}, {}), records)
        artefact._num_bytes = table["bytes"]
        return artefact

    _checksum, _num_bytes = "", 0  # of weights.bin

    @cached_property
    def kernel_choices(self) -> KernelChoices:
        """Return what select_kernels chose; the standard kernels when it did not run."""
        if not (self.path / FILE).exists():
            return NO_CHOICES
        return KernelChoices.from_json(_read_json(self.path / FILE))

    @property
    def library(self) -> Path:
        return self.path / LIBRARY

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    @cached_property
    def program(self) -> Any:
        return _read_json(self.path / PROGRAM)

    @cached_property
    def plan(self) -> Any:
        return _read_json(self.path / PLAN)

    @cached_property
    def certificates(self) -> Any:
        return _read_json(self.path / CERTIFICATES)

    @cached_property
    def report(self) -> Any:
        return _read_json(self.path / REPORT)

    @property
    def weights(self) -> memoryview:
        """Return weights.bin, mapped shared and read-only; made on first use, owned by this."""
        if self._mapped is None:
            with cache_errors(self.path / WEIGHTS):
                self._mapped = map_aligned(self.path / WEIGHTS)
        mapped, begin = self._mapped
        return memoryview(mapped)[begin : begin + self._num_bytes]

    def tensor(self, name: str) -> Array:
        """Return a tensor as a read-only view; bfloat16 as its bits in uint16."""
        record = self.tensors[name]
        dtype = np.dtype(NUMPY_DTYPES[record.dtype])
        if record.num_bytes == 0:
            return np.empty(record.shape, dtype)
        count = record.num_bytes // dtype.itemsize
        return np.frombuffer(self.weights, dtype, count, record.offset).reshape(record.shape)

    def verify_weights(self, num_threads: int = 2) -> None:
        """Checksum the mapped weights (which also brings them in); CacheError if they differ."""
        empty = (self.path / WEIGHTS).stat().st_size == 0
        got = Checksum().hex() if empty else checksum_buffer(self.weights, num_threads)
        if got != self._checksum:
            raise damaged(self.path / WEIGHTS, f"has checksum {got}, expected {self._checksum}")

    def close(self) -> None:
        """Unmap the weights. Raises BufferError while an array of `tensor` is alive."""
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            mapped[0].close()


def verify_weights(path: Path, num_threads: int = 2) -> None:
    """Checksum the weights of the artefact at `path`; raise CacheError if they are damaged."""
    artefact = Artefact.open(path)
    try:
        artefact.verify_weights(num_threads)
    finally:
        artefact.close()


def _check_records(records: list[TensorRecord], size: int) -> None:
    """Raise ValueError unless tensors are aligned, in order, apart from each other and inside."""
    end = 0
    for record in records:
        if record.dtype not in NUMPY_DTYPES or any(dim < 0 for dim in record.shape):
            raise ValueError(f"{record.name}: bad dtype or shape")
        if record.offset % ALIGNMENT or record.offset < end:
            raise ValueError(f"{record.name}: bad offset {record.offset}")
        end = record.offset + record.num_bytes
    if end > size or len({record.name for record in records}) != len(records):
        raise ValueError("a tensor ends after the file, or a name is used twice")


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise damaged(path, "is too large")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, "is missing or cannot be read") from error
