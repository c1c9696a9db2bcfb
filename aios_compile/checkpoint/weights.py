"""The safetensors weights of a folder: one file, or shards with an index. Mapped, never copied."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aios_compile.checkpoint import paths
from aios_compile.checkpoint.json_file import read_json
from aios_compile.checkpoint.safetensors_header import TensorInfo, read_header
from aios_compile.errors import CheckpointError

__all__ = ["TensorInfo", "WeightFiles"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_DTYPES = ("F32", "F16", "BF16")
# Older checkpoints carry the RoPE frequencies, which are computed from config.json.
HARMLESS_EXTRA = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
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


class WeightFiles:
    """Tensors by name over all shards. Headers are checked on opening; data is mapped when read."""

    def __init__(self, tensors: Mapping[str, TensorInfo], files: tuple[Path, ...]) -> None:
        self.files = files  # every file that the weights depend on, the index included
        self._tensors = dict(tensors)
        self._maps: dict[Path, mmap.mmap] = {}

    @staticmethod
    def open(folder: Path) -> WeightFiles:
        """Read the headers of model.safetensors or of all shards. Raises CheckpointError."""
        if paths.exists(folder, SINGLE):
            path = paths.member(folder, SINGLE)
            return WeightFiles(read_header(path), (path,))
        if paths.exists(folder, INDEX):
            return _open_shards(folder)
        raise _no_weights(folder)

    def names(self) -> list[str]:
        """Return all tensor names, in the order of the files."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a tensor. Raises CheckpointError where it is missing."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.files[0]}: tensor {name!r} is missing")
        return self._tensors[name]

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Return a read-only view of the mapped file; bfloat16 as uint16 bits, float8 as uint8."""
        info = self.info(name)
        if info.begin == info.end:
            return np.empty(info.shape, NUMPY_TYPES[info.dtype])
        mapped = self._map(info.file, info.end)
        data = np.frombuffer(mapped, np.uint8, info.end - info.begin, info.begin)
        if info.begin % np.dtype(NUMPY_TYPES[info.dtype]).itemsize:
            data = data.copy()  # a header of odd size: kernels must not meet unaligned pointers
        array = data.view(NUMPY_TYPES[info.dtype]).reshape(info.shape)
        array.flags.writeable = False
        return array

    def check(
        self, expected: Mapping[str, tuple[int, ...]], tied: Mapping[str, str] | None = None
    ) -> None:
        """Raise CheckpointError for the first missing, extra, misshaped or mistyped tensor.

        `tied` maps an alias to the tensor whose values it shares (lm_head.weight to the embedding):
        the alias may be absent, or present with the same bytes.
        """
        tied = tied or {}
        for name, shape in expected.items():
            if name in tied and name not in self._tensors:
                continue
            info = self.info(name)
            where = f"{info.file}: tensor {name!r}"
            if info.shape != tuple(shape):
                raise CheckpointError(
                    f"{where} has the shape {list(info.shape)}, expected {list(shape)}"
                )
            if info.dtype not in WEIGHT_DTYPES:
                known = ", ".join(WEIGHT_DTYPES)
                raise CheckpointError(f"{where} has the dtype {info.dtype}, expected {known}")
        for alias, source in tied.items():
            if alias in self._tensors and not self._identical(alias, source):
                raise CheckpointError(
                    f"{self.info(alias).file}: tensor {alias!r} differs from {source!r}, to which "
                    "config.json ties it",
                    advice="set tie_word_embeddings to false if the head has weights of its own",
                )
        for name in sorted(self._tensors.keys() - expected.keys() - tied.keys()):
            if not HARMLESS_EXTRA.fullmatch(name):
                raise CheckpointError(
                    f"{self.info(name).file}: tensor {name!r} is not part of this model"
                )

    def close(self) -> None:
        """Unmap the files. Arrays that are still in use keep theirs."""
        for mapped in self._maps.values():
            try:
                mapped.close()
            except BufferError:
                continue  # a view is alive: the map goes with it
        self._maps.clear()

    def _identical(self, alias: str, source: str) -> bool:
        a, b = self.info(alias), self.info(source)
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        left, right = (self.read(name).reshape(-1).view(np.uint8) for name in (alias, source))
        block = 1 << 24  # bounded memory for the comparison
        return all(
            np.array_equal(left[i : i + block], right[i : i + block])
            for i in range(0, len(left), block)
        )

    def _map(self, path: Path, end: int) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._maps[path]) < end:
            raise CheckpointError(
                f"{path}: truncated since it was opened: {len(self._maps[path])} bytes, "
                f"expected {end}"
            )
        return self._maps[path]


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
