"""Where a program's weights lie: streamed ones in huge pages, all others mapped from the artefact.

A decode step streams every packed weight once. Mapped from a file they lie in pages of 4 KiB, whose
translations run out every few microseconds: the same kernels run 10 to 16 % faster on a copy in
huge pages (bf16, int8 and int4 of a 0.6B shape, 2 cores of Zen 4; docs/performance.md). The copy is
read from the file, so that only one of the two is resident; the file's pages stay the system's.
The reads run beside whatever the caller goes on with (a start imports the engine and parses the
tokenizer meanwhile); who asks for `arrays` waits for them.
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile import env
from aios_compile.codegen.artefact import ALIGNMENT, NUMPY_DTYPES, Artefact, TensorRecord
from aios_compile.codegen.manifest import WEIGHTS, damaged
from aios_compile.codegen.private_folder import cache_errors
from aios_compile.codegen.program import Program
from aios_compile.runtime.memory import Region

LEAST_BYTES = 64 << 20  # less than this stays in caches or within reach of the translations
READ_BYTES = 8 << 20  # a thread reads at a time
SPARE_BYTES = 1 << 30  # left to others
HUGE_PAGE = 2 << 20
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class WeightMemory:
    """`arrays`: name -> the weight's packed array, read-only, valid until `close`.

    free_bytes: memory that may be used. Weights stay mapped when they are few, when memory is
    short, where the system has no huge pages, and with AIOS_HUGE_WEIGHTS=0.
    """

    def __init__(
        self, artefact: Artefact, program: Program, num_threads: int, free_bytes: int
    ) -> None:
        names = [w.name for w in program.weights]
        streamed = {w.name: artefact.tensors[w.name] for w in program.weights if w.packed}
        total = sum(_padded(record.num_bytes) for record in streamed.values())
        self._path = artefact.path / WEIGHTS
        self._region: Region | None = None
        self._reads: list[Future[None]] = []
        if total >= LEAST_BYTES and total + SPARE_BYTES <= free_bytes and huge_pages_allowed():
            self._region = Region(total + HUGE_PAGE)
        else:
            streamed = {}
        self._arrays: dict[str, NDArray[Any]] = {
            name: artefact.tensor(name) for name in names if name not in streamed
        }
        if self._region is not None:
            self._begin_to_read(self._region, streamed, num_threads)

    @property
    def in_huge_pages(self) -> bool:
        return self._region is not None

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Wait until all is read and return the weights. CacheError for a file that ends early."""
        with cache_errors(self._path):
            while self._reads:
                self._reads[0].result()
                self._reads.pop(0)
        return self._arrays

    def _begin_to_read(
        self, region: Region, records: dict[str, TensorRecord], num_threads: int
    ) -> None:
        raw = region.array()
        begin, pool = -raw.ctypes.data % HUGE_PAGE, ThreadPoolExecutor(num_threads)
        try:
            for name, record in records.items():
                bytes_of = raw[begin : begin + record.num_bytes]
                for at in range(0, record.num_bytes, READ_BYTES):
                    piece = bytes_of[at : at + READ_BYTES]
                    self._reads.append(pool.submit(self._read, record.offset + at, piece))
                array = bytes_of.view(NUMPY_DTYPES[record.dtype]).reshape(record.shape)
                array.flags.writeable = False
                self._arrays[name] = array
                begin += _padded(record.num_bytes)
        finally:
            pool.shutdown(wait=False)  # its threads end with the last read

    def _read(self, offset: int, array: NDArray[np.uint8]) -> None:
        into, done = memoryview(array), 0  # type: ignore[arg-type]  # numpy < 2.1 does not say so
        with open(self._path, "rb", buffering=0) as file:
            while done < len(into):
                count = os.preadv(file.fileno(), [into[done:]], offset + done)
                if count == 0:
                    raise damaged(self._path, f"ends at byte {offset + done}")
                done += count

    def close(self) -> None:
        """Free the copy; no step may run and no array be touched afterwards. Idempotent."""
        reads, self._reads = self._reads, []
        for read in [read for read in reads if not read.cancel()]:
            with suppress(Exception):  # nobody wants it any more
                read.result()
        self._arrays = {}
        if self._region is not None:
            self._region.close()


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
    def of(cls, path: Path, num_threads: int, reads: bool = True) -> OpenArtefact:
        """Open the artefact at `path` and begin to read its weights, if kernels of C++ take them
        and the caller `reads` them.
        """
        artefact = Artefact.open(path)
        program, free = Program.from_json(artefact.program), free_memory_bytes()
        if not reads or program.settings.get("family") == "triton":
            return cls(artefact, program, free)
        return cls(artefact, program, free, WeightMemory(artefact, program, num_threads, free))

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


def huge_pages_allowed() -> bool:
    """Return whether the system gives huge pages to who asks, and the user does not mind."""
    if not env.HUGE_WEIGHTS.get_int(0, 1) or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in ENABLED.read_text()
    except OSError:
        return False


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
