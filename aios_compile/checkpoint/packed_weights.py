"""The weights of a folder with a quantization_config: packed matrices beside ordinary tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from aios_compile.checkpoint.awq import find_awq
from aios_compile.checkpoint.compressed_tensors import find_compressed
from aios_compile.checkpoint.gptq import find_gptq
from aios_compile.checkpoint.packed_matrix import (
    PackedMatrix,
    column_order,
    dequantize_rows,
    stored_fields,
    stored_form,
)
from aios_compile.checkpoint.safetensors_header import TensorInfo
from aios_compile.checkpoint.tensors import PIECE_WEIGHTS, Array, StoredFields, Tensors
from aios_compile.checkpoint.weights import WEIGHT_DTYPES, WeightFiles
from aios_compile.errors import CheckpointError, UnsupportedModelError

Find = Callable[[WeightFiles, Mapping[str, Any], str], dict[str, PackedMatrix]]
METHODS: Mapping[str, Find] = {
    "gptq": find_gptq,
    "awq": find_awq,
    "compressed-tensors": find_compressed,
}


class PackedWeights(Tensors):
    """Tensors of which some are packed; `read` and `pieces` dequantise those to float32."""

    float_dtypes = WEIGHT_DTYPES

    def __init__(self, weights: WeightFiles, packed: Mapping[str, PackedMatrix]) -> None:
        self.files = weights.files
        self._plain = weights
        self._packed = {f"{stem}.weight": matrix for stem, matrix in packed.items()}
        self._forms: dict[str, str] = {}
        parts = {
            (info.file, info.begin, info.end)
            for matrix in packed.values()
            for info in matrix.layout.parts.values()
        }
        self._tensors: dict[str, TensorInfo] = {}
        for name in weights.names():
            info = weights.info(name)
            if (info.file, info.begin, info.end) not in parts:
                self._tensors[name] = info
        for name, matrix in self._packed.items():
            if name in self._tensors:
                raise CheckpointError(f"{self.files[0]}: tensor {name!r} is there, and packed too")
            layout, codes = matrix.layout, matrix.layout.parts["codes"]
            shape = (layout.rows, layout.columns)
            self._tensors[name] = TensorInfo(
                codes.file, layout.format, shape, codes.begin, codes.end
            )

    @staticmethod
    def open(weights: WeightFiles, settings: Any, where: str) -> PackedWeights:
        """Find the packed matrices. Raises CheckpointError, or UnsupportedModelError naming the
        method or the setting that is not implemented.
        """
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        if not isinstance(method, str) or method not in METHODS:
            raise UnsupportedModelError(
                f"{where}: quantization_config with the method {repr(method)[:40]} is not "
                f"implemented, known: {', '.join(METHODS)}",
                advice="use the unquantised checkpoint, or one in GPTQ, AWQ or GGUF",
            )
        packed = METHODS[method](weights, settings, f"{where}: quantization_config")
        if not packed:
            raise CheckpointError(
                f"{where}: quantization_config says {method}, no tensor of the folder is packed so"
            )
        return PackedWeights(weights, packed)

    def is_quantized(self, name: str) -> bool:
        return name in self._packed

    def quantized_bytes(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for matrix in self._packed.values():
            found[matrix.layout.format] += matrix.layout.num_bytes
        return dict(found)

    def read(self, name: str) -> Array:
        if name not in self._packed:
            self.info(name)
            return self._plain.read(name)
        values = np.empty(self.info(name).shape, np.float32)
        for row, piece in self.pieces(name):
            values[row : row + len(piece)] = piece
        return values

    def pieces(self, name: str) -> Iterator[tuple[int, Array]]:
        if name not in self._packed:
            yield 0, self.read(name)
            return
        for begin, end in self._steps(name):
            yield begin, dequantize_rows(self._packed[name], begin, end)

    def stored_form(self, name: str) -> str:
        if name not in self._packed:
            return ""
        if name not in self._forms:  # looks at all zero points
            self._forms[name] = stored_form(self._packed[name])
        return self._forms[name]

    def column_order(self, name: str) -> Array | None:
        return column_order(self._packed[name]) if name in self._packed else None

    def fields(self, name: str) -> Iterator[tuple[int, StoredFields]]:
        form = self.stored_form(name)
        for begin, end in self._steps(name):
            yield begin, stored_fields(self._packed[name], form, begin, end)

    def _steps(self, name: str) -> Iterator[tuple[int, int]]:
        rows, columns = self.info(name).shape
        step = max(8, PIECE_WEIGHTS // columns // 8 * 8)  # AWQ has words of eight rows
        for begin in range(0, rows, step):
            yield begin, min(begin + step, rows)

    def check(
        self, expected: Mapping[str, tuple[int, ...]], tied: Mapping[str, str] | None = None
    ) -> None:
        """As for all; biases of packed layers that the model has not may be there if all zeros,
        which older quantisers wrote.
        """
        for name in list(self._tensors):
            stem, _, ending = name.rpartition(".")
            if ending == "bias" and name not in expected and f"{stem}.weight" in self._packed:
                if np.any(self._plain.read(name)):
                    continue
                del self._tensors[name]
        super().check(expected, tied)

    def close(self) -> None:
        self._plain.close()
