"""The attention kernel over a long context beside this machine's read bandwidth and FMA peak.

    python -m benchmarks.attention [--threads 2] [--context 8192] [--tokens 1,2,4,8,64]
                                   [--pages random|ascending] [--kv bf16|int8|fp8]
                                   [--products float,rounded]

Qwen3-0.6B's heads (16 query, 8 key/value, 128 wide), bf16, int8 or e4m3 caches, one sequence whose
last tokens are computed. Its pages of 16 tokens lie in random order (the worst) or ascending (it
grew alone). Products: of floats, or of queries and probabilities rounded for dot products (over
bf16 and int8), by turns. A list of layers of 512 MiB is streamed, so that nothing comes from the
caches. Times are medians of processor time of the slowest thread.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable

import numpy as np
import torch

from aios_compile.codegen.cpp import paged_attention
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.ir import ops
from aios_compile.ir.symbols import new_fake, new_fake_mode
from benchmarks.kernels import BYTES
from benchmarks.probes import Sizes, calls, interleaved, library, probes

HEADS, KV_HEADS, WIDTH, PAGE = 16, 8, 128, 16


STORED = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def attention_source(pages: int, kv: str = "bf16", rounded: bool = False) -> KernelSource:
    """Return the kernel for caches of `pages` pages, all of which one sequence may hold."""
    mode, graph = new_fake_mode(), torch.fx.Graph()
    stored, in_codes = STORED[kv], kv != "bf16"
    shapes = {
        "q": (("T", HEADS, WIDTH), torch.float32),
        "k_cache": ((pages, KV_HEADS, WIDTH, PAGE), stored),
        "v_cache": ((pages, KV_HEADS, PAGE, WIDTH), stored),
        "starts": ((2,), torch.int64),
        "lengths": ((1,), torch.int64),
        "tables": ((1, pages), torch.int64),
    }
    if in_codes:
        names = ("k_scales", "v_scales")
        shapes |= dict.fromkeys(names, ((pages, KV_HEADS, PAGE), torch.float32))
    holders = [graph.placeholder(name) for name in shapes]
    call = graph.call_function(
        torch.ops.aios.paged_attention.default,
        (*holders[:6], WIDTH**-0.5, None, None, None, None),
        {**dict(zip(("k_scales", "v_scales"), holders[6:])), "rounded": rounded},
    )
    graph.output(call)
    for holder, (shape, dtype) in zip(holders, shapes.values()):
        holder.meta["val"] = new_fake(mode, shape, dtype)
    call.meta["val"] = new_fake(mode, ("T", HEADS, WIDTH), torch.float32)
    operands = [Operand.of_value(n.name, n.meta["val"]) for n in (*holders, call)]
    spec = paged_attention.spec_of(torch.fx.GraphModule(torch.nn.Module(), graph), operands)
    assert spec is not None
    return paged_attention.emit(spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--tokens", default="1,2,4,8,64")
    parser.add_argument("--pages", choices=("random", "ascending"), default="random")
    parser.add_argument("--kv", choices=tuple(STORED), default="bf16")
    parser.add_argument("--products", default="float,rounded")
    arguments = parser.parse_args()
    assert ops.TABLE
    pages = -(-arguments.context // PAGE)
    in_codes = arguments.kv != "bf16"
    kinds = [k for k in arguments.products.split(",") if k == "float" or arguments.kv != "fp8"]
    sources = [attention_source(pages, arguments.kv, k == "rounded") for k in kinds]
    lib, rng = library(sources), np.random.default_rng(0)
    page_bytes = KV_HEADS * WIDTH * PAGE * (1 if in_codes else 2)
    layers = max(1, BYTES // (2 * pages * page_bytes))
    values = rng.standard_normal((2, pages, KV_HEADS, WIDTH * PAGE), dtype=np.float32)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    scales = np.zeros((layers, 2, pages, KV_HEADS, PAGE), np.float32)
    if in_codes:
        stored = np.clip(np.rint(values * 30), -127, 127).astype(np.int8)
        if arguments.kv == "fp8":
            stored = torch.from_numpy(stored).float().to(STORED["fp8"]).view(torch.uint8).numpy()
        scales[:] = rng.uniform(0.5, 1.5, scales.shape[1:]).astype(np.float32) / 30
    caches = np.repeat(stored[None], layers, 0)
    read, fma, operations = probes(lib, caches, arguments.threads)
    order = rng.permutation(pages) if arguments.pages == "random" else np.arange(pages)
    tables = order.astype(np.int64)
    parts = [np.zeros(space.shape, np.float32) for space in sources[0].workspace]
    lengths = np.array([arguments.context])
    for tokens in map(int, arguments.tokens.split(",")):
        q = rng.standard_normal((tokens, HEADS, WIDTH), dtype=np.float32)
        out = np.zeros((tokens, HEADS, WIDTH), np.float32)
        starts = np.array([0, tokens])
        used = layers if tokens <= 8 else max(1, layers * 4 // tokens)
        lists = [
            [a.ctypes.data for a in (q, *layer, starts, lengths, tables, *scale, out, *parts)]
            for layer, scale in zip(caches[:used], scales if in_codes else [()] * used)
        ]
        works = [_work(lib, source, arguments.threads, lists, tokens) for source in sources]
        reading, computing, *times = interleaved(arguments.threads, read, fma, *works)
        bandwidth, peak = caches.nbytes / reading, operations / computing
        for kind, source, work, seconds in zip(kinds, sources, works, times):
            for thread in (*range(arguments.threads), 0):  # one after another: all parts are there
                work(thread)
            if source.finishes:
                for thread in range(arguments.threads):
                    work(thread)
            _check(q, caches[0], scales[0], tables, out, arguments.context, kind)
            moved = (caches[0].nbytes + in_codes * scales[0].nbytes) * used / seconds
            flops = 4 * HEADS * WIDTH * arguments.context * tokens * used / seconds
            print(
                f"T={tokens:4d} {kind:8} {moved / 1e9:6.1f} of {bandwidth / 1e9:5.1f} GB/s "
                f"({moved / bandwidth:4.0%})  {flops / 1e9:6.1f} of {peak / 1e9:5.1f} GFLOP/s "
                f"({flops / peak:4.0%})  {1e6 * seconds / used:8.0f} us a layer",
                flush=True,
            )


def _work(
    lib: ctypes.CDLL, source: KernelSource, threads: int, lists: list[list[int]], tokens: int
) -> Callable[[int], None]:
    """Return what one thread does of a kernel, for each list of addresses."""
    count = getattr(lib, f"{source.symbol}_items")
    count.restype = ctypes.c_int64
    items = count(ctypes.byref(Sizes(tokens, 1, 1, 1)))
    work = calls(getattr(lib, source.symbol), items, threads, lists, tokens)
    return _then_finish(work, lib, source, threads, lists, tokens) if source.finishes else work


def _then_finish(
    work: Callable[[int], None],
    lib: ctypes.CDLL,
    source: KernelSource,
    threads: int,
    lists: list[list[int]],
    tokens: int,
) -> Callable[[int], None]:
    """Return `work` and, behind it, the merging of the partial results.

    A thread may merge parts that another has not written yet: that changes values, not the time.
    """
    count = getattr(lib, f"{source.symbol}_finish_items")
    count.restype = ctypes.c_int64
    first = (ctypes.c_void_p * len(lists[0]))(*lists[0])
    items = count(ctypes.byref(Sizes(tokens, 1, 1, 1)), first)
    finish = calls(getattr(lib, f"{source.symbol}_finish"), items, threads, lists, tokens)

    def both(i: int) -> None:
        work(i)
        finish(i)

    return both


def _check(
    q: np.ndarray,
    cache: np.ndarray,
    scales: np.ndarray,
    tables: np.ndarray,
    out: np.ndarray,
    context: int,
    kind: str,
) -> None:
    """Compare the last token with float64 arithmetic."""
    if cache.dtype != np.uint16:
        codes = torch.from_numpy(cache[:, tables])
        codes = codes if codes.dtype == torch.int8 else codes.view(STORED["fp8"])
        wide, each = codes.double().numpy(), scales[:, tables].astype(np.float64)
    else:
        wide = (cache[:, tables].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        each = np.ones((2, len(tables), KV_HEADS, PAGE))
    k = wide[0].reshape(-1, KV_HEADS, WIDTH, PAGE) * each[0][:, :, None]
    v = wide[1].reshape(-1, KV_HEADS, PAGE, WIDTH) * each[1][..., None]
    k, v = k.transpose(1, 0, 3, 2), v.transpose(1, 0, 2, 3)
    k, v = k.reshape(KV_HEADS, -1, WIDTH), v.reshape(KV_HEADS, -1, WIDTH)
    for head in range(HEADS):
        group = head * KV_HEADS // HEADS
        scores = k[group, :context] @ q[-1, head] * WIDTH**-0.5
        weights = np.exp(scores - scores.max())
        expected = weights @ v[group, :context] / weights.sum()
        assert np.abs(out[-1, head] - expected).max() < (1e-3 if kind == "float" else 5e-3)


if __name__ == "__main__":
    main()
