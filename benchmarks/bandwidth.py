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


def read_bandwidth(num_threads: int, num_bytes: int = 1 << 30, repeats: int = 7) -> float:
    """Return bytes a second of reading memory far larger than the caches, median of `repeats`."""
    with tempfile.TemporaryDirectory() as folder:
        target = build.Target.host()
        objects = build.build_objects([("read_all", SOURCE)], Path(folder), target)
        library = build.load(build.link(objects, Path(folder) / "read.so", target))
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.read_all.restype = ctypes.c_uint64
    count = num_bytes // 8 // num_threads // 64 * 64
    data = np.arange(count * num_threads + 8, dtype=np.uint64)
    begin = -(-data.ctypes.data // 64) * 64
    times = []
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            starts = [begin + i * count * 8 for i in range(num_threads)]
            list(pool.map(lambda address: library.read_all(address, count), starts))
            times.append(time.perf_counter() - start)
    return count * num_threads * 8 / statistics.median(times)


if __name__ == "__main__":
    for threads in (1, 2):
        print(f"{threads} threads: {read_bandwidth(threads) / 1e9:.1f} GB/s")
