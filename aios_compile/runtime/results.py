"""What a step on a device gives back: the sampled rows in one block, the logits on demand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.operand import BYTES, dim_value
from aios_compile.codegen.program import Program
from aios_compile.codegen.step_results import LAZY, StepResults
from aios_compile.runtime.device import Device, Memory
from aios_compile.runtime.program_runner import NUMPY_DTYPES
from aios_compile.runtime.staging import SIDES

__all__ = ["LAZY", "Results"]


class Results:
    """The block that collect_results fills, and its copies on the host, by turns: the result of one
    step is looked at while the next one's arrives. `max_rows`: of a step."""

    def __init__(self, program: Program, max_rows: int, device: Device) -> None:
        self.device = device
        self._spec = StepResults.of(program.outputs, program.sizes)
        self._row_bytes = self._spec.row_bytes()
        self.memory: Memory = device.allocate(max_rows * self._row_bytes)
        self._host = [device.host_bytes(max_rows * self._row_bytes) for _ in range(SIDES)]
        self._logits = next((e for e in program.outputs if e.name == LAZY), None)
        self._host_logits: NDArray[np.uint8] | None = None
        self._sizes = program.sizes
        self._one_value = {e.name for e in program.outputs if len(e.shape) == 1}

    @property
    def has_logits(self) -> bool:
        return self._logits is not None

    def download(self, bucket_rows: int, side: int = 0) -> None:
        """Ask for the copy of the results, in one go. bucket_rows: R of the graph that runs."""
        into = self._host[side][: bucket_rows * self._row_bytes]
        if len(into):
            self.device.download(self.memory, 0, into)

    def views(self, bucket_rows: int, rows: int, side: int = 0) -> dict[str, NDArray[Any]]:
        """Return views of the first `rows` rows, once the copy has ended; valid until the next
        copy to this side.
        """
        begins, found = self._spec.places(bucket_rows), {}
        for name, dtype, width in self._spec.outputs:
            size = rows * width * BYTES[dtype]
            raw = self._host[side][begins[name] : begins[name] + size]
            values: NDArray[Any] = raw.view(NUMPY_DTYPES[dtype])
            found[name] = values if name in self._one_value else values.reshape(rows, width)
        return found

    def read_logits(self, arena: Memory, rows: int) -> NDArray[Any]:
        """Copy the first rows of the logits, [rows, V], and wait for them."""
        entry = self._logits
        assert entry is not None, "the program has logits"
        width = [dim_value(d, self._sizes) for d in entry.shape[1:]]
        size = rows * math.prod(width) * BYTES[entry.dtype]
        if self._host_logits is None or len(self._host_logits) < size:
            self._host_logits = self.device.host_bytes(size)
        into = self._host_logits[:size]
        self.device.download(arena, entry.offset, into)
        self.device.synchronize()
        return into.view(NUMPY_DTYPES[entry.dtype]).reshape([rows, *width])
