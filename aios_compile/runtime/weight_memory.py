"""Where a program's weights lie: streamed ones in huge pages, all others mapped from the artefact.

A decode step streams every packed weight once. Mapped from a file they lie in pages of 4 KiB, whose
translations run out every few microseconds: the same kernels run 10 to 16 % faster on a copy in
huge pages (bf16, int8 and int4 of a 0.6B shape, 2 cores of Zen 4; docs/performance.md). The copy is
read from the file, so that only one of the two is resident; the file's pages stay the system's.
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
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
    short, where the system has no huge pages, and with AIOS_HUGE_WEIGHTS=0. Raises CacheError for a
    file that ends early.
    """

    def __init__(
        self, artefact: Artefact, program: Program, num_threads: int, free_bytes: int
    ) -> None:
        names = [w.name for w in program.weights]
        streamed = {w.name: artefact.tensors[w.name] for w in program.weights if w.packed}
        total = sum(_padded(record.num_bytes) for record in streamed.values())
        self._region: Region | None = None
        if total >= LEAST_BYTES and total + SPARE_BYTES <= free_bytes and huge_pages_allowed():
            self._region = Region(total + HUGE_PAGE)
        else:
            streamed = {}
        self.arrays: dict[str, NDArray[Any]] = {
            name: artefact.tensor(name) for name in names if name not in streamed
        }
        try:
            self._read(artefact.path / WEIGHTS, streamed, num_threads)
        except BaseException:
            self.close()
            raise

    @property
    def in_huge_pages(self) -> bool:
        return self._region is not None

    def _read(self, path: Path, records: dict[str, TensorRecord], num_threads: int) -> None:
        if self._region is None:
            return
        raw = self._region.array()
        begin, pieces = -raw.ctypes.data % HUGE_PAGE, []
        for name, record in records.items():
            bytes_of = raw[begin : begin + record.num_bytes]
            for at in range(0, record.num_bytes, READ_BYTES):
                pieces.append((record.offset + at, bytes_of[at : at + READ_BYTES]))
            array = bytes_of.view(NUMPY_DTYPES[record.dtype]).reshape(record.shape)
            array.flags.writeable = False
            self.arrays[name] = array
            begin += _padded(record.num_bytes)
        with cache_errors(path), open(path, "rb", buffering=0) as file:

            def read(piece: tuple[int, NDArray[np.uint8]]) -> None:
                (offset, array), done = piece, 0
                into = memoryview(array)  # type: ignore[arg-type]  # numpy < 2.1 does not say so
                while done < len(into):
                    count = os.preadv(file.fileno(), [into[done:]], offset + done)
                    if count == 0:
                        raise damaged(path, f"ends at byte {offset + done}")
                    done += count

            with ThreadPoolExecutor(num_threads) as pool:
                list(pool.map(read, pieces))

    def close(self) -> None:
        """Free the copy; no step may run and no array be touched afterwards. Idempotent."""
        self.arrays = {}
        if self._region is not None:
            self._region.close()


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
