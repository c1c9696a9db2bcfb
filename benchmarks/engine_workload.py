"""Requests with shared prefixes and mixed lengths, and the ways in which ours runs them."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_GROUPS = 4  # of requests with one prefix: four system prompts
CONCURRENT = 16
Tokens = list[list[int]]  # generated, one list a request


@dataclass(frozen=True)
class Workload:
    """Prompts and how many tokens each is to give; the first `shared_tokens` are a group's."""

    prompts: list[list[int]]
    output_tokens: list[int]
    shared_tokens: int

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_tokens)

    @property
    def num_sharable_tokens(self) -> int:
        """Prompt tokens that some request before has computed: all but each group's first."""
        return (len(self.prompts) - NUM_GROUPS) * self.shared_tokens


def make_workload(
    count: int, shared_tokens: int, own_tokens: int, output_tokens: int, seed: int
) -> Workload:
    """Return random requests; own parts and outputs have between a half and 3/2 of their means."""
    rng = np.random.default_rng(seed)

    def mixed(mean: int) -> int:
        return int(rng.integers(max(1, mean // 2), mean + mean // 2 + 1))

    prefixes = [rng.integers(3, 800, shared_tokens).tolist() for _ in range(NUM_GROUPS)]
    prompts = [
        [*prefixes[i % NUM_GROUPS], *rng.integers(3, 800, mixed(own_tokens)).tolist()]
        for i in range(count)
    ]
    return Workload(prompts, [mixed(output_tokens) for _ in range(count)], shared_tokens)


@dataclass(frozen=True)
class Outcome:
    """One run of a workload. ttft_s from the first submission, as all came at once; or nothing."""

    seconds: float
    tokens: Tokens
    ttft_s: list[float]


def ours(model: Any, work: Workload, tenant: str, at_once: int) -> Outcome:
    """Run the requests `at_once` at a time, each group to its end (all of them: continuous).

    tenant: salts the prefix cache, so that every run starts with an empty one.
    """
    begin, tokens, first = time.perf_counter(), [], []
    for start in range(0, len(work.prompts), at_once):
        here = slice(start, start + at_once)
        before = time.perf_counter() - begin
        params = [
            model.sampling_defaults.params(
                max_tokens=count, temperature=0, ignore_eos=True, tenant=tenant
            )
            for count in work.output_tokens[here]
        ]
        for output in model.generate(work.prompts[here], params):
            tokens.append(output.outputs[0].token_ids)
            first.append(before + output.metrics.ttft_us / 1e6)
    return Outcome(time.perf_counter() - begin, tokens, first)


def summary(work: Workload, runs: list[Outcome], base: list[Outcome]) -> dict[str, Any]:
    """Return medians over the rounds, ratios to `base` of the same round, and equal tokens."""
    times = [run.seconds for run in runs]
    ratios = [run.seconds / other.seconds for run, other in zip(runs, base)]
    firsts = [second for run in runs for second in run.ttft_s]
    pairs = list(zip(runs[0].tokens, base[0].tokens))
    return {
        "seconds": statistics.median(times),
        "output_tokens_s": work.num_output_tokens / statistics.median(times),
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "rounds": len(runs),
        "ttft_p50_ms": 1e3 * statistics.median(firsts) if firsts else None,
        "equal_requests": sum(a == b for a, b in pairs),
        "equal_first_tokens": sum(a[0] == b[0] for a, b in pairs),
    }
