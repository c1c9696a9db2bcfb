"""Decode, batched decode, prefill, long context, starts and memory beside the field, in one run.

    python -m benchmarks.cpu [--shape qwen3-0.6b] [--rows decode,...] [--weights bf16,int8,int4]
                             [--threads 2] [--rounds 9] [--without torch.compile] [--json]
                             [--target avx2]

Peers: llama.cpp (llama-cpp-python with BF16, Q8_0 and Q4_0 files of the same random checkpoint: the
same bits a weight, output matrix included), transformers eager (the faster of float32 and bf16) and
torch.compile. All take turns in every round; the machine's read bandwidth and peaks are measured
around each of our turns. Logits are held against float32 on each engine's own weights before
anything is timed. A row is void when llama.cpp reads less than 80 % of the share of the bandwidth
that a healthy build reaches (judged where the weights fit no cache).

Results are kept in benchmarks/results as rows are done; a run that was cut off goes on where it
stopped (--again measures anew). --prepare makes everything that takes long (checkpoint, GGUF files,
artefacts, reference logits, Inductor's cache) and measures nothing. --target holds our kernels to a
narrower instruction set than the machine has, for a llama.cpp that was built for the same one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aios_compile.codegen.cpp import build
from benchmarks import processes, reference, report
from benchmarks.floors import BITS, Rates, Work, decode_floor, prefill_floor
from benchmarks.gguf_file import KINDS, write_gguf
from benchmarks.interleaved import compare
from benchmarks.machine import describe
from benchmarks.ours import POOL_TOKENS, Ours, config_of, max_positions, prompt_ids
from benchmarks.probes import MachineProbe
from benchmarks.shapes import SHAPES, make

PROMPT_TOKENS, STEPS = 64, 16
LONG_CONTEXT = 8192
CACHE_BYTES = 256 << 20  # what is larger is in no cache
COMPILED_POSITIONS = 512  # of the cache that torch.compile's graphs are made for
COMPILED_PROMPT = 256  # each length is a graph that takes a minute or more: only this one
EXAMPLE = Path(__file__).parents[1] / "examples" / "shakespeare"
TIMED = ("decode", "batch8", "prefill256", "prefill1024")
CONTEXTS = {"context8k": "auto", "context8k-int8": "int8"}  # by the type of keys and values
ROWS = (*TIMED, *CONTEXTS, "starts", "memory")
Keep = Callable[[str, dict[str, Any]], None]  # called with each row as it is done
PEERS = ("llama.cpp", "transformers", "torch.compile")


class Bench:
    """One shape on this machine: folders, options, and the file that results are kept in."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.threads: int = args.threads
        self.kept = Path(args.folder or Path(tempfile.gettempdir()) / f"aios-bench-{args.shape}")
        self.kept.mkdir(parents=True, exist_ok=True)
        self.folder = EXAMPLE if args.shape == "example" else make(args.shape, self.kept)
        self.work = Work.of(config_of(self.folder))
        self.cache = self.kept / "artefacts"
        self.vocab = min(int(config_of(self.folder)["vocab_size"]), 1000)
        self.positions = max_positions(self.folder)
        self._probes: dict[int, MachineProbe] = {}

    def rates(self, weight_bytes: int) -> Callable[[], Rates]:
        """Return what measures the machine; weights that fit a cache are read from one."""
        size = weight_bytes if weight_bytes < CACHE_BYTES else 1 << 30
        if size not in self._probes:
            self._probes[size] = MachineProbe(self.threads, size)
        return self._probes[size].rates

    def has(self, peer: str) -> bool:
        return peer not in self.args.without

    def ids(self, count: int, seed: int = 0) -> list[int]:
        return prompt_ids(self.vocab, count, seed)

    def gguf(self, weights: str) -> Path:
        """Return the file of a row's weights, written when it is not there."""
        path = self.kept / f"{KINDS[weights]}.gguf"
        write_gguf(self.folder, path, KINDS[weights])
        return path

    def ours(self, weights: str, tokens: int = POOL_TOKENS, kv: str = "auto") -> Ours:
        ours = Ours(self.folder, weights, self.threads, self.work, self.cache, tokens, kv)
        rounding = reference.Rounding.of_program(weights, ours.model.program)
        self._check("ours", ours.logits, rounding)
        return ours

    def llama(self, weights: str, kv: str = "auto") -> Any:
        from benchmarks.peers.llama_cpp import LlamaCpp

        peer = LlamaCpp(self.gguf(weights), self.threads)
        logits = peer.context(4 * PROMPT_TOKENS, 1, kv).logits
        self._check("llama.cpp", logits, reference.Rounding.of_llama(weights))
        return peer

    def _check(
        self, name: str, logits: Callable[[list[int]], Any], rounding: reference.Rounding
    ) -> None:
        ids = self.ids(PROMPT_TOKENS)
        want = reference.logits(self.folder, self.kept, ids, rounding)
        found = reference.error(logits(ids), want)
        print(f"  {name} {rounding.weights}: logits differ from float32 by {found:.2%}", flush=True)
        limit = reference.LIMITS[rounding.weights]
        assert found < limit, f"{name}, {rounding.weights}: {found:.3f}, expected below {limit}"


def timed_rows(bench: Bench, weights: str, rows: list[str], keep: Keep) -> None:
    """Measure decode, batch8 and prefill rows of one kind of weights; all engines are loaded."""
    ours = bench.ours(weights)
    llama = bench.llama(weights) if bench.has("llama.cpp") else None
    eager = _eager_peers(bench) if weights == "bf16" else {}
    for row in rows:
        tokens = int(row.removeprefix("prefill")) if row.startswith("prefill") else 0
        if tokens + STEPS > bench.positions:
            continue
        run = _prefill if tokens else _decode
        keep(row, run(bench, weights, ours, llama, eager, tokens or (8 if row == "batch8" else 1)))
    ours.close()
    if llama is not None:
        llama.close()


def _decode(
    bench: Bench, weights: str, ours: Ours, llama: Any, eager: dict[str, Any], batch: int
) -> dict[str, Any]:
    prompts = [bench.ids(PROMPT_TOKENS, seed) for seed in range(batch)]
    peers: dict[str, Callable[[], float]] = {}
    if llama is not None:
        context = llama.context(4 * PROMPT_TOKENS, batch)
        lengths = context.hold(prompts)
        peers["llama.cpp"] = lambda: context.decode(lengths, STEPS)
    for name, peer in eager.items():
        if name != "torch.compile" or batch == 1:  # its graphs are made for one sequence
            peers[name] = lambda p=peer: p.decode(prompts, STEPS)  # type: ignore[misc]
    behind = PROMPT_TOKENS + STEPS // 2
    found = measured(
        bench, peers, ours.weight_bytes, lambda: ours.decode(prompts, STEPS),
        lambda rates: decode_floor(
            rates, bench.work, weights, ours.weight_bytes, batch, behind
        ),
        tokens=batch, bytes=ours.weight_bytes + batch * behind * bench.work.kv_bytes(),
    )  # fmt: skip
    if llama is not None and batch == 1 and ours.weight_bytes > CACHE_BYTES:
        from benchmarks.peers.llama_cpp import health

        peer = found["peers"]["llama.cpp"]
        rate = bench.work.weight_bytes(BITS[weights]) / peer["seconds"]["median"]
        peer["health"] = health(KINDS[weights], rate, found["rates"]["bandwidth"])
    return found


def _prefill(
    bench: Bench, weights: str, ours: Ours, llama: Any, eager: dict[str, Any], tokens: int
) -> dict[str, Any]:
    seeds = iter(range(1 << 20))
    peers: dict[str, Callable[[], float]] = {}

    def fresh() -> list[int]:  # ours would find a prompt again in its prefix cache
        return bench.ids(tokens, tokens + next(seeds))

    if llama is not None:
        context = llama.context(tokens)
        peers["llama.cpp"] = lambda: context.prefill(fresh())
    for name, peer in eager.items():
        if name != "torch.compile" or tokens == COMPILED_PROMPT:
            peers[name] = lambda p=peer: p.prefill(fresh())  # type: ignore[misc]
    return measured(
        bench, peers, ours.weight_bytes, lambda: ours.prefill(fresh()),
        lambda rates: prefill_floor(rates, bench.work, weights, ours.weight_bytes, tokens),
        tokens=tokens,
    )  # fmt: skip


def measured(
    bench: Bench,
    peers: dict[str, Callable[[], float]],
    weight_bytes: int,
    ours: Callable[[], float],
    floor: Callable[[Rates], float],
    **known: Any,
) -> dict[str, Any]:
    """Warm every engine up, leave the slower dtype of transformers out, and compare."""
    ours()
    warm = {name: min(peer(), peer()) for name, peer in peers.items()}
    dtypes = sorted((n for n in peers if n.startswith("transformers")), key=lambda n: warm[n])
    kept = {name: peer for name, peer in peers.items() if name not in dtypes[1:]}
    slower = {name: warm[name] for name in dtypes[1:]}
    found = compare(ours, kept, bench.rates(weight_bytes), floor, bench.args.rounds)
    return {**known, **found, "slower_seconds": slower}


def _eager_peers(bench: Bench) -> dict[str, Any]:
    if not (bench.has("transformers") or bench.has("torch.compile")):
        return {}
    from benchmarks.peers import eager

    found: dict[str, Any] = {}
    narrow = eager.load(bench.folder, "bfloat16")
    if bench.has("transformers"):
        found["transformers bfloat16"] = eager.Eager(narrow)
        found["transformers float32"] = eager.Eager(eager.load(bench.folder, "float32"))
    if bench.has("torch.compile"):
        found["torch.compile"] = eager.Compiled(narrow, COMPILED_POSITIONS)
    return found


def context_row(bench: Bench, weights: str, kv: str) -> dict[str, Any] | None:
    """What a token of context costs: decode behind 8,192 tokens less decode behind 64."""
    length = LONG_CONTEXT
    if length + STEPS > bench.positions:
        return None
    short, long = bench.ids(PROMPT_TOKENS), bench.ids(length, 1)
    ours = bench.ours(weights, length + 2 * PROMPT_TOKENS + STEPS, kv)
    ours.decode([long], 1)
    between = length - PROMPT_TOKENS
    peers: dict[str, Callable[[], float]] = {}
    if bench.has("llama.cpp"):
        peer = bench.llama(weights, kv)
        far, near = (peer.context(n + 4 * PROMPT_TOKENS, 1, kv) for n in (length, PROMPT_TOKENS))
        lengths = far.hold([long]), near.hold([short])
        peers["llama.cpp"] = lambda: (
            (far.decode(lengths[0], STEPS) - near.decode(lengths[1], STEPS)) / between
        )
    bits = 8.5 if kv == "int8" else 16.0
    found = measured(
        bench, peers, ours.weight_bytes,
        lambda: (ours.decode([long], STEPS) - ours.decode([short], STEPS)) / between,
        lambda rates: bench.work.kv_bytes(bits) / rates.bandwidth,
        tokens=1, bytes=bench.work.kv_bytes(bits),
    )  # fmt: skip
    ours.close()
    if peers:
        peer.close()
    return found


def run_rows(bench: Bench, weights: str, rows: list[str], keep: Keep) -> None:
    """Measure the rows of one kind of weights."""
    timed = [row for row in rows if row in TIMED]
    if timed:
        timed_rows(bench, weights, timed, keep)
    for name, kv in CONTEXTS.items():
        if name in rows and (row := context_row(bench, weights, kv)):
            keep(name, row)
    if "starts" in rows:
        keep("starts", processes.starts(bench, weights))
    if "memory" in rows:
        keep("memory", processes.memory(bench, weights))


def prepare(bench: Bench, weights: str, rows: list[str]) -> None:
    """Make what takes long: files, artefacts, reference logits, Inductor's cache."""
    bench.ours(weights).close()
    for name, kv in CONTEXTS.items():
        if name in rows and bench.positions > LONG_CONTEXT:
            bench.ours(weights, LONG_CONTEXT + 2 * PROMPT_TOKENS + STEPS, kv).close()
    if bench.has("llama.cpp"):
        bench.llama(weights).close()
    if weights == "bf16" and bench.has("torch.compile"):
        peer = _eager_peers(bench)["torch.compile"]
        peer.decode([bench.ids(PROMPT_TOKENS)], 1)
        if f"prefill{COMPILED_PROMPT}" in rows:
            peer.prefill(bench.ids(COMPILED_PROMPT))


def hold_to(target: str, rows: list[str]) -> None:
    """Let our compiler see only the processor features of one of its targets."""
    known = {t.name: needs for t, needs in build.TARGETS if needs <= build.cpu_features()}
    if target not in known or set(rows) & {"starts", "memory"}:
        raise SystemExit(f"--target: one of {', '.join(known)}, and no rows of other processes")
    build.cpu_features = lambda: known[target]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen3-0.6b", choices=[*SHAPES, "example"])
    parser.add_argument("--folder", help="where checkpoint, files and artefacts are kept")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--weights", default=",".join(BITS), help=f"of {', '.join(BITS)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every engine")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each engine")
    parser.add_argument("--without", default="", help=f"peers to leave out: {', '.join(PEERS)}")
    parser.add_argument("--results", type=Path, help="file of results; default in benchmarks/")
    parser.add_argument("--target", help="instruction set of our kernels, e.g. avx2")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--prepare", action="store_true", help="make files and artefacts only")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args()
    args.without = [name for name in args.without.split(",") if name]
    rows = args.rows.split(",")
    for name, known in ((args.without, PEERS), (rows, ROWS), (args.weights.split(","), BITS)):
        if unknown := set(name) - set(known):
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if args.target:
        hold_to(args.target, rows)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    results = report.Results(args.results, args.shape, args.threads)
    for weights in args.weights.split(","):
        if args.prepare:
            prepare(bench, weights, rows)
            continue
        left = [row for row in rows if args.again or not results.has(weights, row)]

        def keep(row: str, found: dict[str, Any], weights: str = weights) -> None:
            report.show(row, weights, found)
            found |= {"without": args.without, "target": build.Target.host().name}
            results.add(weights, row, found, describe())

        run_rows(bench, weights, left, keep)
        gc.collect()
    if not args.prepare:
        print(json.dumps(results.data, indent=1) if args.json else report.table(results.data))


if __name__ == "__main__":
    main()
