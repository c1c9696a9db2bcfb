"""The simulator against the real engine, on traces unlike those that its costs were fitted to.

    python -m benchmarks.simulator [MODEL] [--threads 1] [--rounds 3] [--json FILE]

The cost model is fitted to the sweep of `aios bench`; then traces, whose rates and lengths it has
not seen, are played in real time on the engine and simulated with that model. Machines drift: one
with neighbours runs at another speed every few seconds. So all is cut in short slices that take
turns on one engine: a sweep, a trace, a sweep, the same trace once more, a sweep, and so on. What a
play is held against is fitted to the two sweeps around it alone, and the errors are medians over
all plays, two of each trace a round.

Beside each error stands what the engine itself makes of the same trace when it is played again
right away (the median of how far the two plays are apart): the simulator cannot be told from a
perfect one where its error is no larger than that, and the 10 % are held to have failed where
it is larger than both. Real times begin when the engine has the request (as its metrics count; a
sleep before it overshoots), and the simulated requests come at those times; tokens are there when
they are handed out.
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
from typing import Any, NamedTuple

import aios_compile
from aios_compile.runtime.health import now_us
from aios_compile.runtime.replay import read_records
from aios_compile.study.bench import bench
from aios_compile.study.cost_model import fit_steps, read_steps
from aios_compile.study.simulator import Arrival, percentile, simulate, synthetic
from benchmarks.machine import describe

Pair = tuple[dict[str, float], dict[str, float]]  # really and simulated
Row = dict[str, float]
Span = tuple[int, int]  # of the log's clock, microseconds
BOUND = 0.10  # asked of every number
# kind, share of the capacity, mean prompt, mean output, shared tokens
TRACES = {
    "longer prompts, calm": ("poisson", 0.3, 90, 20, 0),
    "longer answers, busier": ("poisson", 0.6, 16, 80, 64),
    "bursts": ("bursts", 0.4, 60, 48, 32),
    "overload": ("poisson", 2.0, 30, 30, 0),
}


class Play(NamedTuple):
    """A trace as the engine played it, behind sweep number `after`: numbers, and when it came."""

    after: int
    really: dict[str, float]
    came: list[Arrival]


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


def measured(model: Any, args: argparse.Namespace) -> tuple[list[Span], dict[str, list[Play]]]:
    """Sweep and play by turns; return when each sweep was, and the plays between them."""
    sweeps: list[Span] = []
    played: dict[str, list[Play]] = {name: [] for name in TRACES}

    def sweep(rounds: int = 1) -> float:
        begin = now_us()
        rows = bench(model, rounds=rounds, seed=len(sweeps)).decode
        sweeps.append((begin, now_us()))
        return next(row.tokens_a_second for row in rows if row.num_sequences == 16)

    speed = sweep()
    for turn in range(args.rounds):
        for seed, (name, spec) in enumerate(TRACES.items()):
            seed += turn * len(TRACES)
            arrivals = trace(spec, args.requests, speed, model.limits.max_model_len, seed)
            for _ in range(2):
                really, came = play(model, arrivals)
                played[name].append(Play(len(sweeps) - 1, really, came))
                speed = sweep()
    return sweeps, played


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="examples/shakespeare")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    log = Path(tempfile.mkdtemp(prefix="aios-logs-")) / "log.jsonl"
    with aios_compile.load_and_compile(
        args.model, num_threads=args.threads, decision_log=str(log), progress=False
    ) as model:
        warm_up(model)
        sweeps, played = measured(model, args)
    steps = read_steps(log)
    limits, options, _ = read_records(log)
    alone = [fit_steps([steps.within([span])], str(log)) for span in sweeps]
    speeds = [cost.step_us(16) for cost in alone]
    drift = [max(a, b) / min(a, b) for a, b in pairwise(speeds)]
    print(f"a step of 16 tokens in {len(sweeps)} sweeps: {min(speeds):.0f} to {max(speeds):.0f} us")
    print(f"one sweep against the next: {statistics.median(drift):.2f}x, at most {max(drift):.2f}x")
    result = {}
    for name, plays in played.items():
        pairs = []
        for each in plays:
            around = steps.within(sweeps[each.after : each.after + 2])
            cost = fit_steps([around], str(log))
            pairs.append((each.really, simulate(each.came, limits, options, cost).summary()))
        result[name] = compare(pairs)
    report(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result | describe(), indent=1) + "\n")


def report(result: dict[str, dict[str, Row]]) -> None:
    """Print each trace's numbers, and how many of them are within 10 %."""
    for name, rows in result.items():
        print(f"{name:24} {'really':>9} {'simulated':>9} {'error':>7} {'again':>6}")
        for key, row in rows.items():
            numbers = f"{row['really']:9.2f} {row['simulated']:9.2f}"
            print(f"  {key:22} {numbers} {row['error']:+7.1%} {row['again']:6.1%}")
    found = [(abs(r["error"]), r["again"]) for rows in result.values() for r in rows.values()]
    within = sum(error <= BOUND for error, _ in found)
    unsure = sum(BOUND < error <= again for error, again in found)
    print(
        f"within {BOUND:.0%}: {within} of {len(found)}; as near as the engine's next play: {unsure}"
    )


def compare(pairs: list[Pair]) -> dict[str, Row]:
    """Return for each number medians over the plays: really, simulated, relative error, again.

    pairs: in the order played, two of one trace side by side. again: how far the second play of a
    trace is from the first, as a share: what no simulator could foresee.
    """
    rows = {}
    for name in pairs[0][0]:
        both = [(really[name], simulated[name]) for really, simulated in pairs]
        errors = [simulated / really - 1 for really, simulated in both]
        twice = zip(both[::2], both[1::2])
        again = [max(a[0], b[0]) / min(a[0], b[0]) - 1 for a, b in twice]
        reals, simulations = zip(*both)
        numbers = {
            "really": reals, "simulated": simulations, "error": errors, "again": again,
        }  # fmt: skip
        rows[name] = {key: statistics.median(values) for key, values in numbers.items()}
    return rows


if __name__ == "__main__":
    main()
