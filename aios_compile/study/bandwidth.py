"""Measure the plain read bandwidth of this machine: the floor that decode is compared with."""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from aios_compile.codegen.cpp import build

SOURCE = r"""
#include "prelude.h"
extern "C" uint64_t read_all(const uint64_t *p, int64_t count) {
    typedef uint64_t v8 __attribute__((vector_size(64)));
    v8 a{}, b{}, c{}, d{};
    const v8 *q = reinterpret_cast<const v8 *>(p);
    for (int64_t i = 0; i + 4 <= count / 8; i += 4) {
        a ^= q[i]; b ^= q[i + 1]; c ^= q[i + 2]; d ^= q[i + 3];
    }
    a ^= b ^ c ^ d;
    return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}
"""


class BandwidthProbe:
    """A read-only kernel over memory far larger than the caches; `measure` can be interleaved."""

    def __init__(self, num_threads: int, num_bytes: int = 1 << 30) -> None:
        with tempfile.TemporaryDirectory() as folder:
            target = build.Target.host()
            objects = build.build_objects([("read_all", SOURCE)], Path(folder), target)
            self._library = build.load(build.link(objects, Path(folder) / "read.so", target))
        self._library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._library.read_all.restype = ctypes.c_uint64
        self._count = num_bytes // 8 // num_threads // 64 * 64
        self._threads = num_threads
        self._data = np.arange(self._count * num_threads + 8, dtype=np.uint64)
        self._pool = ThreadPoolExecutor(num_threads)

    def measure(self, repeats: int = 1) -> float:
        """Return bytes a second of reading everything so many times."""
        begin = -(-self._data.ctypes.data // 64) * 64
        starts = [begin + i * self._count * 8 for i in range(self._threads)]

        def read(address: int) -> None:
            for _ in range(repeats):
                self._library.read_all(address, self._count)

        start = time.perf_counter()
        list(self._pool.map(read, starts))
        return repeats * self._count * self._threads * 8 / (time.perf_counter() - start)


def read_bandwidth(num_threads: int, repeats: int = 7) -> float:
    """Return bytes a second of reading memory, median of `repeats`."""
    probe = BandwidthProbe(num_threads)
    return statistics.median(probe.measure() for _ in range(repeats))
