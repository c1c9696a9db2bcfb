"""Linear, attention and sampling kernels beside this machine's read bandwidth and FMA peak.

    python benchmarks/kernels.py [--threads 2] [--tokens 1,8,256] [--weights bf16,float,int8,int4]

Shapes of Qwen3-0.6B, random data; quantised weights by name or format, `float` for
bf16 weights with float32 activations where `bf16` rounds them. Weights are streamed from a
set of matrices of 512 MiB, far larger than the caches. Reading them, FMAs (or dot products of
bytes) in registers and the kernel take turns; times are medians of processor time of the slowest
thread, so that other work disturbs little.

2 cores of Zen 4 with AVX512-BF16, other work on all four of the machine, 2 threads (44-52 GB/s;
458 Gop/s of vdpbf16ps, 228 of FMAs, 920 of vpdpbusd), shares of the bandwidth and of the peak:

    shape                  bf16 weights              INT8                     INT4
                       T = 1     8   256         1     8   256           1     8   256
                       bytes  both   ops     bytes  both   ops       bytes   ops   ops
    1024 -> 4096         105 86,68    85        76 55,45    63          87    70    71
    2048 -> 1024         105 82,64    69        70 56,46    58          71    60    51
    1024 -> 6144         109 73,77    83        87 71,58    71          99    62    62
    3072 -> 1024          92 78,69    84        87 57,44    62          91    63    54

On one thread, less disturbed: bf16 T = 256 88-94 %; INT8 T = 1 98 %, T = 8 68-75 % of the
bandwidth, T = 256 66-72 %; INT4 T = 1 98 %, T = 8 72-74 %, T = 256 68-70 % of the peak.
(Above 100 %: the
reading probe does not prefetch, the kernel does.) The peak of vpdpbusd cannot be reached: of every
ten operations on the two pipes that multiply, two scale the sums of a group in float32.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from aios_compile.codegen.cpp import build, linear, quantized_linear
from aios_compile.codegen.operand import Operand, SizeExpr, dim_value
from aios_compile.codegen.packing import pack_pairs16, pack_quant16, pack_rows16
from aios_compile.codegen.source import KernelSource
from aios_compile.ir import ops, quantized
from aios_compile.ir.quant_format import SHORT_NAMES, QuantFormat
from aios_compile.ir.quantize_rows import quantize_rows
from aios_compile.ir.symbols import new_fake, new_fake_mode
from benchmarks.probes import Sizes, calls, interleaved, library, probes

SHAPES = {"qkv": (1024, 4096), "o": (2048, 1024), "gate_up": (1024, 6144), "down": (3072, 1024)}
SHAPES["head"] = (1024, 151936)
BYTES = 512 << 20
PAIRS = "pairs"  # in place of a format: bf16 weights, activations rounded to bf16


def work_of(
    lib: ctypes.CDLL, source: KernelSource, threads: int, operands: list[list[int]], tokens: int
) -> Callable[[int], None]:
    """Return what one thread does of a kernel's phases, for each list of addresses.

    All lists share what the first phase prepares, so one barrier is enough.
    """
    n, p, phases = Sizes(tokens, 1, 1, 1), (ctypes.c_void_p * 1)(), []
    for name in (source.symbol, f"{source.symbol}_finish")[: 1 + source.finishes]:
        count = getattr(lib, f"{name}_items")
        count.restype = ctypes.c_int64
        items = count(ctypes.byref(n), p)
        if items:
            phases.append(calls(getattr(lib, name), items, threads, operands, tokens))
    barrier = threading.Barrier(threads)

    def work(i: int) -> None:
        phases[0](i)
        for phase in phases[1:]:
            barrier.wait()
            phase(i)

    return work


def linear_source(depth: int, columns: int, form: str) -> KernelSource:
    """Return the kernel for weights in bf16 (`pairs`: with rounded activations), or quantised."""
    mode = new_fake_mode()
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    x.meta["val"] = new_fake(mode, ("T", depth), torch.float32)
    if form == PAIRS:
        shape, dtype = (columns, depth), torch.bfloat16
        y = graph.call_function(torch.ops.aios.bf16_linear.default, (x, w))
    elif form:
        shape, dtype = (columns, QuantFormat.parse(form).row_bytes(depth)), torch.uint8
        y = graph.call_function(torch.ops.aios.quantized_linear.default, (x, w, form))
    else:
        shape, dtype = (columns, depth), torch.bfloat16
        y = graph.call_function(torch.ops.aios.linear.default, (x, w))
    graph.output(y)
    w.meta["val"] = new_fake(mode, shape, dtype)
    y.meta["val"] = new_fake(mode, ("T", columns), torch.float32)
    operands = [Operand.of_value(n.name, n.meta["val"]) for n in (x, w, y)]
    packing = {"": "rows16", PAIRS: "pairs16"}.get(form, f"quant16.{form}")
    operands[1] = Operand.of_value("w", w.meta["val"], packing)
    emitter = linear if form in ("", PAIRS) else quantized_linear
    spec = emitter.spec_of(torch.fx.GraphModule(torch.nn.Module(), graph), operands)
    assert spec is not None and isinstance(operands[0].shape[0], SizeExpr)
    return emitter.emit(spec)


def random_weights(depth: int, columns: int, form: str) -> tuple[np.ndarray, Any]:
    """Return a packed matrix, and a function from x[T, depth] to its first 64 columns."""
    rng = np.random.default_rng(0)
    if form not in ("", PAIRS):
        parsed = QuantFormat.parse(form)
        few = torch.from_numpy(rng.standard_normal((1024, depth), dtype=np.float32))
        rows = quantize_rows(few, form).repeat(-(-columns // 1024), 1)[:columns]
        packed = pack_quant16(rows.numpy(), parsed)
        return packed, lambda x: quantized.quantized_linear(torch.tensor(x), rows[:64], form)
    values = rng.standard_normal((columns, depth), dtype=np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    few = (bits[:64].astype(np.uint32) << 16).view(np.float32)
    if form == PAIRS:
        return pack_pairs16(bits), lambda x: torch.tensor(x).bfloat16().float().numpy() @ few.T
    return pack_rows16(bits), lambda x: x @ few.T


def measure(lib: ctypes.CDLL, name: str, source: KernelSource, form: str, arguments: Any) -> None:
    threads, rng = arguments.threads, np.random.default_rng(1)
    depth, columns = SHAPES[name]
    packed, expected = random_weights(depth, columns, form)
    copies = max(1, BYTES // packed.nbytes)
    weights = np.repeat(packed[None], copies, 0)
    read, compute, operations = probes(
        lib, weights, threads, form not in ("", PAIRS), form == PAIRS
    )
    print(f"{name} {depth} -> {columns} {form or 'bf16, float32 activations'}")
    for tokens in map(int, arguments.tokens.split(",")):
        used = copies if tokens <= 8 else max(1, copies * 2 // tokens)
        x = rng.standard_normal((tokens, depth), dtype=np.float32)
        y = np.zeros((tokens, columns), np.float32)
        (space,) = source.workspace
        words = math.prod(dim_value(d, {"T": tokens}) for d in space.shape)
        prepared = np.zeros(words + 16, np.float32)
        places = [y.ctypes.data, prepared.ctypes.data + -prepared.ctypes.data % 64]
        lists = [[x.ctypes.data, w.ctypes.data, *places] for w in weights[:used]]
        work = work_of(lib, source, threads, lists, tokens)
        reading, computing, seconds = interleaved(threads, read, compute, work)
        assert np.abs(y[:, :64] - np.asarray(expected(x))).max() < 1e-2
        bandwidth, peak = weights.nbytes / reading, operations / computing
        moved = packed.nbytes * used / seconds
        flops = 2 * depth * columns * tokens * used / seconds
        print(
            f"  T={tokens:4d} {moved / 1e9:6.1f} of {bandwidth / 1e9:5.1f} GB/s "
            f"({moved / bandwidth:4.0%})  {flops / 1e9:6.1f} of {peak / 1e9:5.1f} Gop/s "
            f"({flops / peak:4.0%})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,2,4,8,256")
    parser.add_argument("--weights", default="bf16,int8,int4")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    arguments = parser.parse_args()
    assert ops.TABLE
    kinds = arguments.weights.split(",")
    short = {**SHORT_NAMES, "float": "", "bf16": PAIRS if build.Target.host().bf16_dot else ""}
    forms = [short.get(k, k) for k in kinds]
    names = arguments.shapes.split(",")
    sources = {(n, f): linear_source(*SHAPES[n], f) for f in forms for n in names}
    lib = library(list(sources.values()))
    for (name, form), source in sources.items():
        measure(lib, name, source, form, arguments)


if __name__ == "__main__":
    main()
