"""What the machine does at best: reads, FMAs and dot products, measured beside what is judged."""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from aios_compile.codegen.cpp import build
from aios_compile.codegen.source import KernelSource
from aios_compile.study.bandwidth import BandwidthProbe
from benchmarks.floors import Rates

KEPT: list[np.ndarray] = []  # memory that probes write
PROBE = """
#include "quantized.h"
extern "C" int64_t probe_items(const Sizes* n) { return n->T; }
extern "C" void probe_read(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  const vi* data = (const vi*)p[0];  // item: 4 KiB
  constexpr int64_t STEP = 4096 / sizeof(vi);
  vi a = {}, b = {}, c = {}, d = {};
  for (int64_t i = begin * STEP; i < end * STEP; i += 4)
    a ^= data[i], b ^= data[i + 1], c ^= data[i + 2], d ^= data[i + 3];
  a ^= b ^ c ^ d;
  if (begin < end) ((volatile int32_t*)p[1])[begin] = a[0];
}
extern "C" void probe_fma(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  vf a[10], b = splat(1.0f - 1e-6f), c = splat(1e-6f);  // item: 10 FMAs
  for (int i = 0; i < 10; ++i) a[i] = splat((float)i);
  for (int64_t i = begin; i < end; ++i)
#pragma GCC unroll 10
    for (int j = 0; j < 10; ++j) a[j] = fma(a[j], b, c);
  for (int i = 1; i < 10; ++i) a[0] += a[i];
  if (begin < end) store((float*)p[0] + (begin ? VL : 0), a[0]);
}
extern "C" void probe_dot(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  vi a[10] = {};
  vq u[2] = {(vq)lanes(), (vq)(lanes() + 5)};  // item: 10 dot products
  const int32_t x = ((const int32_t*)p[0])[1] | 0x01020304;
  for (int64_t i = begin; i < end; ++i)
#if AIOS_DOT
#pragma GCC unroll 10
    for (int j = 0; j < 10; ++j) a[j] = dot4(a[j], u[j % 2], x + j);
#else
#pragma GCC unroll 10
    for (int j = 0; j < 10; ++j) a[j] += sum_pairs(pairs(u[j % 2] ^ (vq)a[j], x + j));
#endif
  for (int i = 1; i < 10; ++i) a[0] += a[i];
  if (begin < end) store((int32_t*)p[0] + (begin ? VL : 0), a[0]);
}
#ifdef __x86_64__
extern "C" int64_t has_bf16() { return __builtin_cpu_supports("avx512bf16"); }
extern "C" __attribute__((target("avx512f,avx512bf16")))
void probe_bf16(const Sizes* n, void* const* p, int64_t begin, int64_t end) {
  __m512 a[10];
  for (int i = 0; i < 10; ++i) a[i] = _mm512_set1_ps((float)i);
  const __m512bh x = (__m512bh)_mm512_loadu_si512(p[0]);  // item: 10 dot products of pairs
  for (int64_t i = begin; i < end; ++i)
#pragma GCC unroll 10
    for (int j = 0; j < 10; ++j) a[j] = _mm512_dpbf16_ps(a[j], x, x);
  for (int i = 1; i < 10; ++i) a[0] += a[i];
  if (begin < end) _mm512_storeu_ps((float*)p[0] + (begin ? VL : 0), a[0]);
}
#else
extern "C" int64_t has_bf16() { return 0; }
#endif
"""


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "TSRP"]


def library(sources: Sequence[KernelSource] = ()) -> ctypes.CDLL:
    """Build kernels and the probes into one library."""
    folder = Path(tempfile.mkdtemp(prefix="aios-bench-"))
    target = build.Target.host()
    objects = build.build_objects([*sources, ("probe", PROBE)], folder, target)
    return build.load(build.link(objects, folder / "kernels.so", target))


def cpu_seconds(threads: int, work: Callable[[int], None]) -> float:
    """Run work(0) .. work(threads - 1) side by side; return the processor time of the slowest."""
    spent = [0.0] * threads

    def timed(i: int) -> None:
        start = time.thread_time()
        work(i)
        spent[i] = time.thread_time() - start

    workers = [threading.Thread(target=timed, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(spent)


def interleaved(threads: int, *works: Callable[[int], None]) -> list[float]:
    """Return the median seconds of each work over rounds in which all take turns."""
    rounds = [[cpu_seconds(threads, work) for work in works] for _ in range(7)]
    return [statistics.median(times) for times in zip(*rounds)]


def calls(
    function: Callable[..., None], items: int, threads: int, operands: list[list[int]], tokens: int
) -> Callable[[int], None]:
    """Return what one thread does: its share of the items, for each list of addresses."""
    n = Sizes(tokens, 1, 1, 1)
    tables = [(ctypes.c_void_p * len(p))(*p) for p in operands]

    def work(i: int) -> None:
        begin, end = items * i // threads, items * (i + 1) // threads
        for p in tables:
            function(ctypes.byref(n), p, ctypes.c_int64(begin), ctypes.c_int64(end))

    return work


def probes(
    lib: ctypes.CDLL, data: np.ndarray, threads: int, quantized: bool = False, bf16: bool = False
) -> tuple[Callable[[int], None], Callable[[int], None], float]:
    """Return (reading all of `data`, products in registers, their operations).

    The products are those of bytes (quantized), of bf16 where the processor has them, or FMAs.
    """
    out = np.zeros(1 << 20, np.float32)
    pages = data.nbytes // 4096
    read = calls(lib.probe_read, pages, threads, [[data.ctypes.data, out.ctypes.data]], 0)
    rounds, lanes = 2_000_000, build.Target.host().vector_bytes // 4
    bf16 = bf16 and build.Target.host().bf16_dot
    function = lib.probe_dot if quantized else lib.probe_bf16 if bf16 else lib.probe_fma
    compute = calls(function, rounds, threads, [[out.ctypes.data]], 0)
    KEPT.append(out)
    return read, compute, rounds * 10 * lanes * 2 * (4 if quantized else 2 if bf16 else 1)


class MachineProbe:
    """Bandwidth and peaks of `threads` cores by the clock; `rates` can be interleaved.

    Bandwidth is the better of two readings: it differs from minute to minute where a machine is
    shared. Peaks are the processor's and do not: the best so far.

    num_bytes: of the memory that is read; weights that fit a cache are held against its speed.
    """

    ITEMS = 200_000  # about 1 to 2 ms a thread and peak

    def __init__(self, threads: int, num_bytes: int = 1 << 30) -> None:
        self._read = BandwidthProbe(threads, num_bytes)
        self._repeats = max(1, (1 << 29) // num_bytes)
        self._library = library()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._best: dict[str, float] = {}
        self._out = np.ones((threads, 1 << 10), np.float32)

    def rates(self) -> Rates:
        """Measure each once."""
        lanes = build.Target.host().vector_bytes // 4
        fma = self._peak("probe_fma", 2 * lanes)
        has_bf16 = self._library.has_bf16() != 0
        return Rates(
            max(self._read.measure(self._repeats) for _ in range(2)),
            fma,
            self._peak("probe_dot", 8 * lanes),
            self._peak("probe_bf16", 4 * lanes) if has_bf16 else fma,
        )

    def _peak(self, name: str, operations: int) -> float:
        """Return operations a second of a probe whose items are ten instructions each."""
        function, sizes = getattr(self._library, name), Sizes(1, 1, 1, 1)

        def work(i: int) -> None:
            table = (ctypes.c_void_p * 1)(self._out[i].ctypes.data)
            function(ctypes.byref(sizes), table, ctypes.c_int64(0), ctypes.c_int64(self.ITEMS))

        begin = time.perf_counter()
        list(self._pool.map(work, range(self._threads)))
        found = self._threads * self.ITEMS * 10 * operations / (time.perf_counter() - begin)
        self._best[name] = max(self._best.get(name, 0.0), found)
        return self._best[name]
