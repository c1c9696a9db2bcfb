"""Many requests at once: throughput, first tokens and step times beside others, one run.

    python -m benchmarks.engine [MODEL | --shape qwen3-0.6b] [--rows bf16,int8,int4]
                                [--parts scheduler,steps,...] [--variants ours,static,...]
                                [--rounds 3] [--json FILE] [--prepare]

64 requests in four groups that share a prefix, mixed lengths, all there at the start. Ours runs
them 16 at a time (continuous batching), one at a time, and in static batches; with and without the
prefix cache; with and without speculation. Peers get the same requests: transformers' static and
continuous batches in the same dtype, llama.cpp with 16 parallel sequences at the same bits a
weight. All variants of a row take turns; tokens of ours must be equal in all of them, and it is
counted how many requests of a peer are equal (bf16 rounds differently, so texts part after a
while). A step is held against its floor: weights and KV over the bandwidth that memory of that size
is read with, or operations over the measured peaks, whichever is longer.

A large model can be measured in pieces, by row, part and variant ("16 at once" is in each, as what
the others are compared with): FILE keeps what earlier pieces found. --prepare compiles the
rows' artefacts and writes llama.cpp's files, so that a run on a quiet machine only measures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import aios_compile
from benchmarks.engine_floor import Floor
from benchmarks.engine_peers import ContinuousBatches, LlamaCpp, StaticBatches, has_llama_cpp
from benchmarks.engine_workload import CONCURRENT, Outcome, Workload, make_workload, ours, summary
from benchmarks.gguf_file import KINDS, write_gguf
from benchmarks.machine import describe
from benchmarks.shapes import SHAPES, make
from benchmarks.speculation import STANZA
from tests.runtime.test_scheduler_time import step_us

Keep = Callable[[str, dict[str, Any]], None]  # called with a row and what was found of it
SIZES = {"shared_tokens": 96, "own_tokens": 24, "output_tokens": 48}
SMALL_SIZES = {"shared_tokens": 64, "own_tokens": 8, "output_tokens": 16}  # for a slow model
STEP_TOKENS = 24


def load(folder: Path, row: str, args: argparse.Namespace, **options: Any) -> Any:
    return aios_compile.load_and_compile(
        folder, quantization=None if row == "bf16" else row, max_num_seqs=CONCURRENT,
        max_model_len=512, num_threads=args.threads, progress=False, **options,
    )  # fmt: skip


def decode_seconds(model: Any, count: int) -> float:
    """Return the seconds of a decode step of `count` sequences, the runtime included: median."""
    prompts = [[3 + i, 7, 11, 13 + i] for i in range(count)]
    outputs = model.generate(prompts, max_tokens=STEP_TOKENS, temperature=0, ignore_eos=True)
    times = [(o.metrics.total_us - o.metrics.ttft_us) / (STEP_TOKENS - 1) / 1e6 for o in outputs]
    return median(times)


def steps(folder: Path, row: str, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return a decode step of one and of 16 sequences beside its floor."""
    floor, found = Floor(folder, row, model, args.threads), {}
    decode_seconds(model, CONCURRENT)
    for count in (1, CONCURRENT):
        pairs = [
            floor.seconds(count, STEP_TOKENS // 2, lambda c=count: decode_seconds(model, c))
            for _ in range(2 * args.rounds + 1)
        ]
        found[f"of_{count}"] = {
            "step_ms": 1e3 * median(seconds for _, seconds in pairs),
            "floor_ms": 1e3 * median(bound for bound, _ in pairs),
            "share_of_floor": median(bound / seconds for bound, seconds in pairs),
            "share_spread": [f(b / s for b, s in pairs) for f in (min, max)],
        }
    found["tokens_against_one"] = CONCURRENT * found["of_1"]["step_ms"] / found["of_16"]["step_ms"]
    return found


def peers(folder: Path, row: str, args: argparse.Namespace, notes: list[str]) -> list[Any]:
    """Return the peers that were asked for and are there; why others are not goes to notes."""
    found: list[Any] = []
    if row == "bf16" and {"transformers", "continuous"} & args.variants:
        static = StaticBatches(folder, "bfloat16", args.threads)
        found += [static] if "transformers" in args.variants else []
        found += [ContinuousBatches(static)] if "continuous" in args.variants else []
    if "llama" in args.variants:
        missing = has_llama_cpp()
        if missing:
            notes.append(f"llama.cpp left out: {missing}")
        else:
            path = Path(args.gguf_folder or folder) / f"{KINDS[row]}.gguf"
            if not path.exists():
                write_gguf(folder, path, KINDS[row])
            found.append(LlamaCpp(path, args.threads, (CONCURRENT + 4) * 512))
    return found


def requests(folder: Path, row: str, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Run the workload in all variants by turns."""
    sizes = {name: getattr(args, name) for name in SIZES}
    work = make_workload(args.requests, **sizes, seed=1)
    notes: list[str] = []
    variants: dict[str, Callable[[Workload, str], Outcome]] = {
        "16 at once": lambda w, t: ours(model, w, t, len(w.prompts)),
    }
    with ExitStack() as stack:
        if "one" in args.variants:
            variants["one at a time"] = lambda w, t: ours(model, w, t, 1)
        if "static" in args.variants:
            variants["static batches of 16"] = lambda w, t: ours(model, w, t, CONCURRENT)
        if "cold" in args.variants:
            cold = stack.enter_context(load(folder, row, args, enable_prefix_caching=False))
            variants["16 at once without prefix cache"] = lambda w, t: ours(
                cold, w, t, len(w.prompts)
            )
        own = set(variants)
        others = peers(folder, row, args, notes)
        variants |= {peer.name: lambda w, _, p=peer: p.run(w) for peer in others}
        runs: dict[str, list[Outcome]] = {name: [] for name in variants}
        warm = make_workload(4, **{**sizes, "output_tokens": 2}, seed=2)
        for name, variant in variants.items():
            variant(warm, "warm " + name)
        for turn in range(args.rounds):
            for name, variant in variants.items():
                before = model.engine.stats.num_cached_tokens
                runs[name].append(variant(work, f"{turn} {name}"))
                if name == "16 at once":
                    saved = model.engine.stats.num_cached_tokens - before
        for peer in others:
            if isinstance(peer, LlamaCpp):
                peer.close()
    tokens = runs["16 at once"][0].tokens
    for name in own:
        for run in runs[name]:
            assert run.tokens == tokens, f"{name}: other tokens than 16 at once"
    found = {name: summary(work, done, runs["16 at once"]) for name, done in runs.items()}
    shared = saved / work.num_sharable_tokens
    return {"variants": found, "prefix_tokens_saved": shared, "notes": notes}


def prepare(folder: Path, row: str, args: argparse.Namespace) -> None:
    """Make what a measurement of a row loads, and measure nothing."""
    for config in (None, {"method": "ngram"}):
        load(folder, row, args, speculative_config=config).close()
    if "llama" in args.variants:
        path = Path(args.gguf_folder or folder) / f"{KINDS[row]}.gguf"
        if not path.exists():
            write_gguf(folder, path, KINDS[row])
    print(f"{row} is ready", flush=True)


def measure(folder: Path, row: str, args: argparse.Namespace, keep: Keep) -> None:
    """Measure the parts that were asked for of one configuration; each is kept as it is done."""
    if {"steps", "requests"} & args.parts:
        with load(folder, row, args) as model:
            if "steps" in args.parts:
                keep(row, {"steps": steps(folder, row, model, args)})
            if "requests" in args.parts:
                keep(row, requests(folder, row, model, args))
    if "speculation" in args.parts:
        keep(row, {"speculation": speculation(folder, row, args)})


def speculation(folder: Path, row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return prompt lookup on repetitive text against none, one sequence: seconds, counts."""
    seconds: dict[str, list[float]] = {"none": [], "ngram": []}
    tokens: dict[str, list[int]] = {}
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(load(folder, row, args, speculative_config=config))
            for name, config in (("none", None), ("ngram", {"method": "ngram"}))
        }
        prompts = {name: model.tokenizer.encode(STANZA * 4) for name, model in models.items()}
        for turn in range(2 * args.rounds + 2):
            for name, model in models.items():
                output = model.generate(
                    prompts[name], max_tokens=3 * args.output_tokens, temperature=0,
                    ignore_eos=True, tenant=str(turn),
                )  # fmt: skip
                tokens[name] = output.outputs[0].token_ids
                if turn:  # the first round is what the number of drafts is learnt from
                    spent = output.metrics.total_us - output.metrics.ttft_us
                    seconds[name].append(spent / 1e6)
        told = str(models["ngram"].engine.speculation)
    assert tokens["none"] == tokens["ngram"], "speculation changed a token"
    none, ngram = (median(seconds[name]) for name in ("none", "ngram"))
    ratios = [a / b for a, b in zip(seconds["none"], seconds["ngram"])]
    return {
        "speedup_of_median": none / ngram,
        "speedup_spread": [min(ratios), max(ratios)],
        "drafts": told,
    }


def show(row: str, result: dict[str, Any]) -> None:
    print(row, flush=True)
    for name, found in result.get("variants", {}).items():
        first, (low, high) = found["ttft_p50_ms"], found["ratio_spread"]
        print(
            f"  {name:50} {found['output_tokens_s']:8.1f} tokens/s, ours is {found['ratio']:5.2f}x "
            f"({low:.2f}-{high:.2f}), first token "
            f"{'      -' if first is None else f'{first:7.1f}'} ms, "
            f"{found['equal_requests']} requests equal, {found['equal_first_tokens']} first tokens"
        )
    if "variants" in result:
        print(f"  shared prefill saved: {result['prefix_tokens_saved']:.1%}")
    for name in ("of_1", "of_16") if "steps" in result else ():
        step = result["steps"][name]
        low, high = step["share_spread"]
        print(
            f"  a decode step {name.replace('_', ' ')}: {step['step_ms']:.3f} ms, floor "
            f"{step['floor_ms']:.3f} ms: {step['share_of_floor']:.0%} ({low:.0%}-{high:.0%})"
        )
    if "steps" in result:
        print(f"  tokens of 16 against one: {result['steps']['tokens_against_one']:.2f}x")
    if "speculation" in result:
        drafts = result["speculation"]
        low, high = drafts["speedup_spread"]
        print(
            f"  prompt lookup on repetitive text: {drafts['speedup_of_median']:.2f}x "
            f"({low:.2f}-{high:.2f}); {drafts['drafts']}"
        )
    for note in result.get("notes", ()):
        print(f"  {note}")
    if row == "scheduler_us":
        print(f"  a step's own time: {result}")


def merge(into: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return `into` with what was found now, dictionaries merged; `into` is changed."""
    for name, value in found.items():
        known = into.get(name)
        both = isinstance(value, dict) and isinstance(known, dict)
        into[name] = merge(known, value) if both else value
    return into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="examples/shakespeare")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights, instead of MODEL")
    parser.add_argument("--folder", help="where the random checkpoint is kept")
    parser.add_argument("--gguf-folder", help="where llama.cpp's files are kept")
    parser.add_argument("--rows", default="bf16", help="of bf16, int8, int4")
    parser.add_argument("--parts", default="scheduler,steps,requests,speculation")
    parser.add_argument("--variants", default="one,static,cold,transformers,continuous,llama")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    for name in SIZES:
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--prepare", action="store_true", help="compile, convert, measure nothing")
    args = parser.parse_args()
    for name, value in (SMALL_SIZES if args.shape else SIZES).items():
        setattr(args, name, getattr(args, name) or value)
    folder = Path(args.model)
    if args.shape:
        folder = make(args.shape, Path(args.folder or Path(tempfile.gettempdir()) / args.shape))
    if args.gguf_folder is None and not args.shape:
        args.gguf_folder = tempfile.mkdtemp(prefix="aios-gguf-")
    args.parts, args.variants = set(args.parts.split(",")), set(args.variants.split(","))
    result: dict[str, Any] = {"model": args.shape or str(folder), "threads": args.threads}
    if args.json and Path(args.json).exists():
        result = json.loads(Path(args.json).read_text())

    def keep(name: str, found: dict[str, Any]) -> None:
        merge(result, {name: found} | describe())
        show(name, found)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")

    print(f"{result['model']}, {args.threads} threads")
    if args.prepare:
        for row in args.rows.split(","):
            prepare(folder, row, args)
        return
    if "scheduler" in args.parts:
        small, large = (step_us(64) for _ in range(5)), (step_us(1024, num_steps=16) for _ in "123")
        keep("scheduler_us", {"64 running": median(small), "1024 running": median(large)})
    for row in args.rows.split(","):
        measure(folder, row, args, keep)


if __name__ == "__main__":
    main()
