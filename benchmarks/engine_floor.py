"""What one decode step cannot be faster than: bytes over bandwidth, or operations over the peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from aios_compile.ir.quant_format import QuantFormat
from aios_compile.runtime.program_runner import state_page_bytes
from aios_compile.study.bandwidth import BandwidthProbe
from benchmarks.ours import weight_bytes
from benchmarks.probes import library, probes

PROBE_SECONDS = 0.02  # of reading: a cache that holds the weights is read several times
MOST_PROBE_BYTES = 1 << 30


def multiplications_a_token(model: Any) -> int:
    """Return the values of all packed matrices: one multiplication and one addition each."""
    total = 0
    for weight in model.program.weights:
        if not weight.packed:
            continue
        rows, width = weight.shape
        form = weight.packed.partition(".")[2]
        total += rows * (QuantFormat.parse(form).depth(width) if form else width)
    return total


class Floor:
    """Probes of this machine for one model; `seconds` can be interleaved with what it bounds.

    The memory that is read has the size of the weights, so that weights which fit a cache are held
    against the cache's speed. The peak is that of FMAs in float32, or of dot products of bytes for
    quantised weights.
    """

    def __init__(self, model: Any, threads: int) -> None:
        self._threads = threads
        self.weight_bytes = weight_bytes(model.program)
        self.kv_bytes_a_token = sum(state_page_bytes(model.program)) / model.limits.page_size
        self.operations_a_token = 2 * multiplications_a_token(model)
        self._probe = BandwidthProbe(threads, min(self.weight_bytes, MOST_PROBE_BYTES))
        self._repeats = 1
        self._repeats = max(1, round(PROBE_SECONDS / (self.weight_bytes / self.bandwidth())))
        quantized = any("quant16" in w.packed for w in model.program.weights)
        self._compute = probes(library([]), np.zeros(4096, np.uint8), 1, quantized)
        self._pool = ThreadPoolExecutor(threads)

    def bandwidth(self) -> float:
        """Return bytes a second."""
        return self._probe.measure(self._repeats)

    def peak(self) -> float:
        """Return operations a second."""
        _, work, operations = self._compute
        begin = time.perf_counter()
        list(self._pool.map(lambda _: work(0), range(self._threads)))
        return operations * self._threads / (time.perf_counter() - begin)

    def seconds(self, num_tokens: int, context: float, measured: Callable[[], float]) -> Any:
        """Return (floor, measured): the better of the readings before and after `measured`."""
        ends = []
        value = 0.0
        for turn in range(2):
            moved = self.weight_bytes + num_tokens * context * self.kv_bytes_a_token
            bound = moved / self.bandwidth(), num_tokens * self.operations_a_token / self.peak()
            ends.append(max(bound))
            value = measured() if turn == 0 else value
        return min(ends), value
