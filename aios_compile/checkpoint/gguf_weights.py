"""The tensors of a GGUF file under their Hugging Face names, dequantised when they are read.

llama.cpp rotates neighbouring pairs in Llama's heads where Hugging Face rotates halves, and its
converter therefore permutes the rows of q and k (conversion/llama.py, `permute`). The permutation
is undone on whole rows, quantised or not, so no value changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from aios_compile.checkpoint.gguf_blocks import BLOCK_TYPES, FLOAT_TYPES, dequantize
from aios_compile.checkpoint.gguf_header import GgufHeader
from aios_compile.checkpoint.gguf_names import ROPE_FACTORS, hf_name
from aios_compile.checkpoint.mapped import MappedFiles
from aios_compile.checkpoint.tensors import PIECE_WEIGHTS, Array, StoredFields, Tensors

NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class GgufWeights(Tensors):
    """Tensors of one file, mapped when they are read.

    permuted_heads: heads by the ending of a tensor's name whose rows are to be put back, e.g.
    {".q_proj.weight": 32}.
    """

    float_dtypes = tuple(FLOAT_TYPES)

    def __init__(self, header: GgufHeader, permuted_heads: dict[str, int]) -> None:
        self.files = (header.path,)
        named = ((hf_name(name) or name, info) for name, info in header.tensors.items())
        self._tensors = {name: info for name, info in named if name != ROPE_FACTORS}
        self._permuted_heads = permuted_heads
        self._mapped = MappedFiles()

    def is_quantized(self, name: str) -> bool:
        return self.info(name).dtype in BLOCK_TYPES

    def quantized_bytes(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for info in self._tensors.values():
            if info.dtype in BLOCK_TYPES:
                found[info.dtype] += info.end - info.begin
        return dict(found)

    def read(self, name: str) -> Array:
        info = self.info(name)
        if not self.is_quantized(name):
            return self._floats(name)
        values = np.empty(info.shape, np.float32)
        for row, piece in self.pieces(name):
            values.reshape(-1, info.shape[-1])[row : row + len(piece)] = piece
        return values

    def pieces(self, name: str) -> Iterator[tuple[int, Array]]:
        if not self.is_quantized(name):
            yield 0, self._floats(name)
            return
        info = self.info(name)
        rows = self.quantized_rows(name)
        step = max(1, PIECE_WEIGHTS // info.shape[-1])
        for row in range(0, len(rows), step):
            yield row, dequantize(info.dtype, rows[row : row + step])

    def stored_form(self, name: str) -> str:
        info = self.info(name)
        good = info.dtype in BLOCK_TYPES and len(info.shape) == 2
        return BLOCK_TYPES[info.dtype].form if good else ""

    def fields(self, name: str) -> Iterator[tuple[int, StoredFields]]:
        info = self.info(name)
        block = BLOCK_TYPES[info.dtype]
        rows = self.quantized_rows(name)
        step = max(1, PIECE_WEIGHTS // info.shape[-1])
        for row in range(0, len(rows), step):
            part = rows[row : row + step]
            groups = block.unpack(part.reshape(-1, block.num_bytes))
            flat = (None if field is None else field.reshape(len(part), -1) for field in groups)
            yield row, StoredFields(*flat)  # type: ignore[arg-type]

    def quantized_rows(self, name: str) -> NDArray[np.uint8]:
        """Return the blocks of a quantised tensor in the model's order: uint8 [rows, bytes]."""
        info = self.info(name)
        num_rows = int(np.prod(info.shape[:-1]))
        data = self._mapped.bytes_of(info.file, info.begin, info.end)
        return self._in_order(name, data.reshape(num_rows, -1))

    def close(self) -> None:
        self._mapped.close()

    def _floats(self, name: str) -> Array:
        info = self.info(name)
        data = self._mapped.bytes_of(info.file, info.begin, info.end)
        array = self._in_order(name, data.view(NUMPY_TYPES[info.dtype]).reshape(info.shape))
        array.flags.writeable = False
        return array

    def _in_order(self, name: str, rows: Array) -> Array:
        """Undo the converter's permutation of the rows within each head."""
        for ending, heads in self._permuted_heads.items():
            if name.endswith(ending) and len(rows) % (2 * heads) == 0:
                pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
                return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
        return rows
