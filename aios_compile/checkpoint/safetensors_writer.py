"""Write one safetensors file, one tensor at a time; all shapes are known beforehand.

The header is written first and no tensor is kept, so a model of any size needs only the memory of
its largest tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.checkpoint.safetensors_header import ITEM_BYTES


class SafetensorsWriter:
    """tensors: name -> (safetensors dtype such as "BF16", shape). Close when all are added."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            self._places[name] = begin, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
        self._base = 8 + len(text)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._base + end)

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Write a tensor's values; bfloat16 as its 16-bit patterns."""
        begin, end = self._places.pop(name)
        data = np.ascontiguousarray(array)
        assert data.nbytes == end - begin, f"{name}: {data.nbytes} bytes for {end - begin}"
        self._file.seek(self._base + begin)
        self._file.write(data.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Finish the file. AssertionError when a tensor was never added."""
        self._file.close()
        assert not self._places, f"never written: {sorted(self._places)[:3]}"
