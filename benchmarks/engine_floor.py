"""What one decode step cannot be faster than, by the count and the probes of benchmarks.cpu."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.floors import Work, decode_floor
from benchmarks.ours import weight_bytes
from benchmarks.probes import MachineProbe

CACHE_BYTES = 256 << 20  # what is larger is in no cache


class Floor:
    """Probes of this machine for one model; `seconds` can be interleaved with what it bounds.

    Weights that fit a cache are held against the cache's speed, and products against the highest
    peak that the processor has for them: bf16 or byte dot products, not FMAs in float32.
    """

    def __init__(self, folder: Path, row: str, model: Any, threads: int) -> None:
        self._row = row
        self._work = Work.of(json.loads((folder / "config.json").read_text()))
        self.weight_bytes = weight_bytes(model.program)
        size = self.weight_bytes if self.weight_bytes < CACHE_BYTES else 1 << 30
        self._probe = MachineProbe(threads, size)

    def seconds(self, count: int, context: int, measured: Callable[[], float]) -> Any:
        """Return (floor, measured) of `count` sequences; the better rates of before and after."""
        before = self._probe.rates()
        value = measured()
        rates = before.better(self._probe.rates())
        args = self._row, self.weight_bytes, count, context
        return decode_floor(rates, self._work, *args), value
