"""What every source of weights offers: names, shapes and values, whatever the files' format."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.checkpoint.safetensors_header import TensorInfo
from aios_compile.errors import CheckpointError

Array = NDArray[Any]
# Older checkpoints carry the RoPE frequencies, which are computed from config.json.
HARMLESS_EXTRA = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
PIECE_WEIGHTS = 1 << 19  # dequantised at a time: 2 MiB of float32


@dataclass(frozen=True)
class StoredFields:
    """The parts of some rows of a quantised matrix: N rows, K columns, G groups, B super-blocks.

    codes: uint8 [N, K]. scales: [N, G], floats or int8 under super_scales float16 [N, B]. minimums:
    [N, G] floats, uint8 under super_minimums float16 [N, B], or uint8 zero points; None without.
    """

    codes: Array
    scales: Array
    minimums: Array | None = None
    super_scales: Array | None = None
    super_minimums: Array | None = None


class Tensors(ABC):
    """Tensors by their Hugging Face names. Headers were checked on opening; data is read later.

    A quantised tensor keeps the dtype of its format in `info`; `read` and `pieces` dequantise it.
    """

    files: tuple[Path, ...]  # every file that the weights depend on
    float_dtypes: tuple[str, ...]  # what a weight may be, besides quantised
    _tensors: Mapping[str, TensorInfo]

    def names(self) -> list[str]:
        """Return all tensor names, in the order of the files."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a tensor. Raises CheckpointError where it is missing."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.files[0]}: tensor {name!r} is missing")
        return self._tensors[name]

    def is_quantized(self, name: str) -> bool:
        """Say whether the tensor is stored as codes and scales."""
        return False

    def quantized_bytes(self) -> dict[str, int]:
        """Return the bytes that quantised tensors take in the files, by format; {} for none."""
        return {}

    def stored_form(self, name: str) -> str:
        """Return the format of ir/quant_format.py in which a tensor can be kept, "" for none."""
        return ""

    def column_order(self, name: str) -> Array | None:
        """Return the column of each value of a row of `fields`, int32 [K]; None for 0, 1, ..."""
        return None

    def fields(self, name: str) -> Iterator[tuple[int, StoredFields]]:
        """Yield (first row, fields) of a tensor that has a stored form."""
        raise NotImplementedError(name)

    @abstractmethod
    def read(self, name: str) -> Array:
        """Return a tensor; bfloat16 as its bits in uint16, a quantised one as float32."""

    def pieces(self, name: str) -> Iterator[tuple[int, Array]]:
        """Yield (first row, rows) of a tensor, so that a large one is never whole in float32."""
        yield 0, self.read(name)

    @abstractmethod
    def close(self) -> None:
        """Unmap the files. Arrays that are still in use keep theirs."""

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
            if info.dtype not in self.float_dtypes and not self.is_quantized(name):
                known = ", ".join(self.float_dtypes)
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
