"""The simulator against the real engine, on traces unlike those that its costs were fitted to.

    python -m benchmarks.simulator [MODEL] [--threads 1] [--rounds 3] [--json FILE]

The cost model is fitted to the sweep of `aios bench`; then traces, whose rates and lengths it has
not seen, are played in real time on the engine and simulated with that model. Each round fits anew,
to a sweep before its traces and one after them, as the speed of a machine drifts; medians over the
rounds are printed side by side. Real times begin
when the engine has the request (as its metrics count; a sleep before it overshoots), and the
simulated requests come at those times; tokens are there when they are handed out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import aios_compile
from aios_compile.runtime.replay import read_records
from aios_compile.study.bench import bench
from aios_compile.study.cost_model import fit_logs
from aios_compile.study.simulator import Arrival, percentile, simulate, synthetic

Pair = tuple[dict[str, float], dict[str, float]]  # really and simulated
# kind, share of the capacity, mean prompt, mean output, shared tokens
TRACES = {
    "longer prompts, calm": ("poisson", 0.3, 90, 20, 0),
    "longer answers, busier": ("poisson", 0.6, 16, 80, 64),
    "bursts": ("bursts", 0.4, 60, 48, 32),
    "overload": ("poisson", 2.0, 30, 30, 0),
}


def trace(spec: Any, count: int, tokens_s: float, most_tokens: int, seed: int) -> list[Arrival]:
    """Return a spec's arrivals; tokens_s is what the engine decodes, so that 1 keeps it busy."""
    kind, share, prompt, output, shared = spec
    rate = share * tokens_s / (prompt / 2 + output)  # a prompt's token costs about a half
    return synthetic(
        kind, count, rate=rate, prompt_tokens=prompt, output_tokens=output, shared_tokens=shared,
        most_tokens=most_tokens, num_ids=800, seed=seed,
    )  # fmt: skip


def warm_up(model: Any) -> None:
    """Touch every page of the pool: the first steps in new memory take several times as long."""
    limits = model.limits
    longest = min(limits.capacity_tokens, limits.max_model_len) - 2
    count = -(-limits.num_pages * limits.page_size // longest)
    prompts = [[3 + (i + k) % 700 for k in range(longest)] for i in range(count)]
    fields = {"max_tokens": 1, "temperature": 0, "ignore_eos": True}
    for i, prompt in enumerate(prompts):
        model.generate([prompt], tenant=f"warm {i}", **fields)


def play(model: Any, arrivals: list[Arrival]) -> tuple[dict[str, float], list[Arrival]]:
    """Submit each request at its time; return what really happened, and when they really came."""
    begin, streams = time.perf_counter() + 0.05 - arrivals[0].at_us / 1e6, []
    times: list[list[float]] = [[] for _ in arrivals]
    for arrival, seen in zip(arrivals, times):
        time.sleep(max(0.0, begin + arrival.at_us / 1e6 - time.perf_counter()))
        fields = {
            "max_tokens": len(arrival.output), "temperature": 0, "ignore_eos": True,
            "tenant": f"{begin} {arrival.tenant}",
        }  # fmt: skip

        def note(seen: list[float] = seen) -> None:
            seen.append(time.perf_counter())  # in the engine's thread, with each token

        streams.append(model.engine.open_stream(list(arrival.prompt), None, fields, on_change=note))
    for stream in streams:
        for _ in stream:
            pass
    outputs = [stream.output() for stream in streams]
    gaps = [1e6 * (b - a) for seen in times for a, b in pairwise(seen)]
    starts = [stream.submitted_us / 1e6 for stream in streams]
    values = {
        "ttft": [1e6 * (seen[0] - start) for seen, start in zip(times, starts)],
        "inter_token": gaps,
        "latency": [1e6 * (seen[-1] - start) for seen, start in zip(times, starts)],
    }
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    found = {"output_tokens_per_s": num_tokens / (max(max(t) for t in times) - starts[0])}
    for name, micros in values.items():
        for percent in (50, 90, 99):
            found[f"{name}_p{percent}_ms"] = percentile(micros, percent) / 1e3
    came = [replace(a, at_us=1e6 * (start - starts[0])) for a, start in zip(arrivals, starts)]
    return found, came


def sweep(path: Path, args: argparse.Namespace) -> float:
    """Log the sweep of `aios bench`; return the tokens a second that 16 sequences decode."""
    with aios_compile.load_and_compile(
        args.model, num_threads=args.threads, decision_log=str(path), progress=False
    ) as model:
        found = bench(model, rounds=3)
    return next(row.tokens_a_second for row in found.decode if row.num_sequences == 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="examples/shakespeare")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="aios-logs-"))
    found: dict[str, list[Pair]] = {name: [] for name in TRACES}
    for turn in range(args.rounds):
        before, after = (logs / f"{turn} {when}.jsonl" for when in ("before", "after"))
        speed = sweep(before, args)
        limits, options, _ = read_records(before)
        played: dict[str, tuple[dict[str, float], list[Arrival]]] = {}
        for seed, (name, spec) in enumerate(TRACES.items()):
            arrivals = trace(spec, args.requests, speed, limits.max_model_len, seed)
            path = logs / f"{turn} {name}.jsonl"  # writing it is part of what was fitted
            with aios_compile.load_and_compile(
                args.model, num_threads=args.threads, decision_log=str(path), progress=False
            ) as model:
                warm_up(model)
                played[name] = play(model, arrivals)
        later = sweep(after, args)
        cost = fit_logs([before, after])
        print(f"{speed:.0f} and {later:.0f} tokens/s of 16 sequences; {cost}", flush=True)
        for name, (really, came) in played.items():
            found[name].append((really, simulate(came, limits, options, cost).summary()))
    result = {name: compare(pairs) for name, pairs in found.items()}
    for name, row in result.items():
        print(name)
        for key, (real, simulated, error, spread) in row.items():
            print(f"  {key:22} {real:9.2f} {simulated:9.2f} {error:+7.1%}   spread {spread:.2f}x")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def compare(pairs: list[Pair]) -> dict[str, tuple[float, ...]]:
    """Return for each number the medians over the rounds: really, simulated, relative error.

    And how far the engine itself was from repeating it: the largest over the smallest. A simulation
    cannot be better than that; on a machine with neighbours it is the number to look at first.
    """
    row = {}
    for name in pairs[0][0]:
        both = [(really[name], simulated[name]) for really, simulated in pairs]
        errors = [simulated / really - 1 for really, simulated in both]
        reals = [really for really, _ in both]
        medians = (statistics.median(values) for values in (*zip(*both), errors))
        row[name] = (*medians, max(reals) / min(reals))
    return row


if __name__ == "__main__":
    main()
