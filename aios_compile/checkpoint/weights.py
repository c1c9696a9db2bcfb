"""The safetensors weights of a folder: one file, or shards with an index. Mapped, never copied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aios_compile.checkpoint import paths
from aios_compile.checkpoint.json_file import read_json
from aios_compile.checkpoint.mapped import MappedFiles
from aios_compile.checkpoint.safetensors_header import TensorInfo, read_header
from aios_compile.checkpoint.tensors import Array, Tensors
from aios_compile.errors import CheckpointError

__all__ = ["TensorInfo", "WeightFiles"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_DTYPES = ("F32", "F16", "BF16")
NUMPY_TYPES: Mapping[str, str] = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "BF16": "<u2",  # numpy has no bfloat16: the bits
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "I64": "<i8",
    "U64": "<u8",
    "F64": "<f8",
}


class WeightFiles(Tensors):
    """Tensors by name over all shards. Headers are checked on opening; data is mapped when read."""

    float_dtypes = WEIGHT_DTYPES

    def __init__(self, tensors: Mapping[str, TensorInfo], files: tuple[Path, ...]) -> None:
        self.files = files  # every file that the weights depend on, the index included
        self._tensors = dict(tensors)
        self._mapped = MappedFiles()

    @staticmethod
    def open(folder: Path) -> WeightFiles:
        """Read the headers of model.safetensors or of all shards. Raises CheckpointError."""
        if paths.exists(folder, SINGLE):
            path = paths.member(folder, SINGLE)
            return WeightFiles(read_header(path), (path,))
        if paths.exists(folder, INDEX):
            return _open_shards(folder)
        raise _no_weights(folder)

    def read(self, name: str) -> Array:
        """Return a read-only view of the mapped file; bfloat16 as uint16 bits, float8 as uint8."""
        info = self.info(name)
        if info.begin == info.end:
            return np.empty(info.shape, NUMPY_TYPES[info.dtype])
        data = self._mapped.bytes_of(info.file, info.begin, info.end)
        if info.begin % np.dtype(NUMPY_TYPES[info.dtype]).itemsize:
            data = data.copy()  # a header of odd size: kernels must not meet unaligned pointers
        array = data.view(NUMPY_TYPES[info.dtype]).reshape(info.shape)
        array.flags.writeable = False
        return array

    def close(self) -> None:
        """Unmap the files. Arrays that are still in use keep theirs."""
        self._mapped.close()


def _open_shards(folder: Path) -> WeightFiles:
    index = paths.member(folder, INDEX)
    where_is = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(where_is, dict) or not where_is:
        raise CheckpointError(f"{index}: weight_map is not an object of tensor names and files")
    for name, shard in where_is.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {repr(shard)[:80]}, expected a "
                ".safetensors file"
            )
    shards = {shard: paths.member(folder, shard) for shard in sorted(set(where_is.values()))}
    tensors: dict[str, TensorInfo] = {}
    for shard, path in shards.items():
        for name, info in read_header(path).items():
            if where_is.get(name) != shard:
                said = where_is.get(name, "nowhere")
                raise CheckpointError(f"{path}: holds tensor {name!r}, the index says {said!r}")
            tensors[name] = info
    for name, shard in where_is.items():
        if name not in tensors:
            raise CheckpointError(f"{shards[shard]}: tensor {name!r} of the index is missing")
    return WeightFiles(tensors, (index, *shards.values()))


def _no_weights(folder: Path) -> CheckpointError:
    pickled = sorted(entry for entry in os.listdir(folder) if entry.endswith(PICKLED))
    if pickled:
        return CheckpointError(
            f"{folder / pickled[0]}: pickled weights can run code and are never loaded",
            advice="convert them with transformers: save_pretrained(folder, "
            "safe_serialization=True)",
        )
    found = sorted(entry for entry in os.listdir(folder) if entry.endswith(".safetensors"))
    return CheckpointError(
        f"{folder}: no {SINGLE} and no {INDEX}"
        + (f", only {', '.join(found[:5])}" if found else "")
    )
