"""Where a program's weights lie: mapped from the artefact, and soon in huge pages.

A decode step streams every packed weight once. In pages of 4 KiB the translations run out every few
microseconds: the same kernels run 10 to 16 % faster in huge pages (bf16, int8 and int4 of a 0.6B
shape, 2 cores of Zen 4; docs/performance.md). A page cache may hold the file in huge pages already.
What it holds in small ones is replaced while steps run, by a thread of low priority, piece by piece
and at a limited rate (`huge_pages.replace`). No address changes, so the first token need not wait.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.aligned_map import HUGE_PAGE
from aios_compile.codegen.artefact import Artefact, TensorRecord
from aios_compile.codegen.program import Program
from aios_compile.runtime import huge_pages

LEAST_BYTES = 64 << 20  # less than this stays in caches or within reach of the translations
SPARE_BYTES = 1 << 30  # left to others
PIECE_BYTES = 16 << 20  # replaced at a time, and what that takes of memory for a moment
DELAY_SECONDS = 0.1  # the first request goes first
# At most: each byte moved is read, cleared and written, and the steps want the memory's bandwidth.
BYTES_A_SECOND = 1 << 30
NICENESS = 10  # behind whatever computes, but not so far that whoever waits for the GIL starves


class WeightMemory:
    """`arrays`: name -> the weight's packed array, read-only, valid until the artefact is closed.

    free_bytes: memory that may be used. Weights stay as the page cache has them when they are few,
    when memory is short, where the system has no huge pages, and with AIOS_HUGE_WEIGHTS=0; else
    `begin` or `finish` moves what is streamed into huge pages. `close` before the artefact.
    """

    def __init__(self, artefact: Artefact, program: Program, free_bytes: int) -> None:
        self.arrays: dict[str, NDArray[Any]] = {
            w.name: artefact.tensor(w.name) for w in program.weights
        }
        packed = [artefact.tensors[w.name] for w in program.weights if w.packed]
        # A view keeps the mapping as long as the thread lives.
        self._view = artefact.weights if packed else memoryview(b"")
        at = np.frombuffer(self._view, np.uint8).ctypes.data if packed else 0
        self._ranges = [(at + begin, at + end) for begin, end in _whole_pages(packed)]
        self._total = sum(end - begin for begin, end in self._ranges)
        enough = self._total >= LEAST_BYTES and self._total + SPARE_BYTES <= free_bytes
        self._moves = enough and at % HUGE_PAGE == 0 and huge_pages.allowed()
        self._moved = 0
        self._why_not = ""
        self._pid = os.getpid()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def in_huge_pages(self) -> bool:
        """Return whether the weights lie in huge pages or will after a few seconds of use."""
        return self._moves and not self._why_not

    def begin(self) -> None:
        """Begin to move weights to huge pages, in a thread of its own."""
        if self._moves and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="huge pages", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Move all weights now, as fast as it goes. `begin` must not have been called."""
        assert self._thread is None, "a thread moves them"
        if self._moves:
            for _ in self._steps():
                pass

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        if self._stop.wait(DELAY_SECONDS):
            return
        begin = time.perf_counter()
        for size in self._steps():
            if self._stop.wait(max(0, begin + size / BYTES_A_SECOND - time.perf_counter())):
                return
            begin = time.perf_counter()

    def _steps(self) -> Iterator[int]:
        """Replace pieces, yield the bytes of each; end where memory or huge pages are short."""
        for begin, end in self._ranges:
            for first in range(begin, end, PIECE_BYTES):
                last = min(first + PIECE_BYTES, end)
                huge_pages.populate(first, last)  # the page cache's huge pages are found only then
                for piece in _between(first, last, huge_pages.find(first, last) or []):
                    size = piece[1] - piece[0]
                    if free_memory_bytes() < SPARE_BYTES + size:
                        self._why_not = "memory is short"
                    elif not huge_pages.replace(*piece):
                        self._why_not = "the system has no more huge pages"
                    if self._why_not:
                        return
                    self._moved += size
                    yield size

    def line(self) -> str:
        """Return how much lies in huge pages by now, and why no more does; "" for few weights."""
        if self._total < LEAST_BYTES:
            return ""
        found = [huge_pages.find(*each) for each in self._ranges]
        huge = sum(end - begin for each in found for begin, end in each or [])
        known = [f"{max(huge, self._moved) >> 20} in huge pages, {self._moved >> 20} of them moved"]
        if not self._moves:
            known.append("the rest stays mapped in small ones")
        elif self._thread is not None and self._thread.is_alive():
            known.append("the rest is being moved")
        known += [self._why_not] if self._why_not else []
        return f"weights: of {self._total >> 20} MiB that are streamed, {'; '.join(known)}"

    def close(self) -> None:
        """Stop moving, within one piece. Idempotent. The artefact unmaps what was moved too."""
        self.arrays = {}
        if self._pid == os.getpid():  # a forked child has no thread, and may find the event locked
            self._stop.set()
            if self._thread is not None:
                self._thread.join()
        self._view.release()


def _whole_pages(records: Iterable[TensorRecord]) -> list[tuple[int, int]]:
    """Return the ranges of offsets in whole huge pages that hold the tensors, in order."""
    found: list[tuple[int, int]] = []
    for record in sorted(records, key=lambda record: record.offset):
        begin = record.offset // HUGE_PAGE * HUGE_PAGE
        end = -(-(record.offset + record.num_bytes) // HUGE_PAGE) * HUGE_PAGE
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif begin < end:
            found.append((begin, end))
    return found


def _between(begin: int, end: int, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what of begin to end lies in none of the ranges, which are in order."""
    for first, last in (*ranges, (end, end)):
        if begin < first:
            yield begin, first
        begin = last


@dataclass
class OpenArtefact:
    """An artefact that was opened, its program, and its weights for a C++ program, else None.

    free_bytes: of memory, before any weight was read.
    """

    artefact: Artefact
    program: Program
    free_bytes: int
    memory: WeightMemory | None = None

    @classmethod
    def of(cls, path: Path, reads: bool = True) -> OpenArtefact:
        """Open the artefact at `path` and map its weights, if kernels of C++ take them and the
        caller `reads` them.
        """
        artefact = Artefact.open(path)
        program, free = Program.from_json(artefact.program), free_memory_bytes()
        if not reads or program.settings.get("family") == "triton":
            return cls(artefact, program, free)
        return cls(artefact, program, free, WeightMemory(artefact, program, free))

    def close(self) -> None:
        """Free the weights, unmap the file. Idempotent; BufferError while an array is alive."""
        if self.memory is not None:
            self.memory.close()
        self.artefact.close()


def free_memory_bytes() -> int:
    """Return the memory that can be used without swapping (MemAvailable), or half of a GiB."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 512 << 20
