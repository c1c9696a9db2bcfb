"""A sweep over what steps can be, on the engine itself: speeds, and a log to fit a cost model to.

Decodes of 1, 2, 3, ... sequences, some of them with long contexts, prompts of all lengths alone and
beside running streams, and short requests that come while others run; each a few times, with pauses
in which the engine's thread sleeps, as it does between requests.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

COUNTS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 32, 48, 64, 96, 128, 192, 256)
LENGTHS = (3, 6, 12, 24, 48, 96, 160, 256, 384, 512, 1024, 2048)
CONTEXTS = {1: 2048, 3: 680, 8: 256, 16: 128}  # decodes of so many with so long prompts
DECODE_TOKENS = 16
PAUSE_S = 0.004
NUM_ARRIVALS = 12  # a round, in steps that run: from fewer the cost of taking one in is chance


@dataclass(frozen=True)
class DecodeRow:
    """Steps of `num_sequences` sequences; medians."""

    num_sequences: int
    step_us: float
    tokens_a_second: float


@dataclass(frozen=True)
class PrefillRow:
    """A prompt of so many tokens on an idle engine; medians."""

    num_tokens: int
    ttft_us: float
    tokens_a_second: float


@dataclass(frozen=True)
class Bench:
    """What the sweep measured, the runtime included."""

    decode: list[DecodeRow]
    prefill: list[PrefillRow]


def bench(model: Any, rounds: int = 3, seed: int = 0) -> Bench:
    """Run the sweep `rounds` times on a CompiledModel; nothing else may run on it meanwhile."""
    sweep = _Sweep(model, random.Random(seed))
    limits = model.limits
    counts = [count for count in COUNTS if count <= limits.max_running]
    longest = min(limits.capacity_tokens, limits.max_model_len) - 3
    lengths = [length for length in LENGTHS if length <= longest]
    steps: dict[int, list[float]] = {count: [] for count in counts}
    firsts: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(rounds):
        for count in counts:
            steps[count] += sweep.decode(count)
        for count, length in CONTEXTS.items():
            if count <= limits.max_running:
                sweep.decode(count, min(length, longest - 2 * DECODE_TOKENS))
        for length in lengths:
            firsts[length].append(sweep.prefill(length))
            if length > 24:
                sweep.prefill_beside_streams(length)
        sweep.arrivals_beside_streams()
    return Bench(
        [_decode_row(count, statistics.median(times)) for count, times in steps.items()],
        [_prefill_row(length, statistics.median(times)) for length, times in firsts.items()],
    )


def _decode_row(count: int, step_us: float) -> DecodeRow:
    return DecodeRow(count, step_us, count / step_us * 1e6)


def _prefill_row(length: int, ttft_us: float) -> PrefillRow:
    return PrefillRow(length, ttft_us, length / ttft_us * 1e6)


class _Sweep:
    """Requests of random tokens, each under a tenant of its own: nothing is in the prefix cache."""

    def __init__(self, model: Any, rng: random.Random) -> None:
        self._engine, self._rng = model.engine, rng
        self._most_id = model.limits.vocab_size - 1
        self._num_prompts = 0

    def _open(self, length: int, max_tokens: int, times: list[float]) -> Any:
        prompt = [self._rng.randint(0, self._most_id) for _ in range(length)]
        self._num_prompts += 1
        fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        fields["tenant"] = f"bench {self._num_prompts}"

        def note() -> None:
            times.append(time.perf_counter())

        return self._engine.open_stream(prompt, None, fields, on_change=note)

    def decode(self, count: int, length: int = 2) -> list[float]:
        """Return the times between tokens, in microseconds, once all sequences run.

        length: of the prompts, or a little more.
        """
        time.sleep(PAUSE_S)
        longer = DECODE_TOKENS + 8 + count // 8  # they begin earlier and end later than the last
        streams = [self._open(length + i % 3, longer, []) for i in range(count - 1)]
        times: list[float] = []
        _read([*streams, self._open(length + 1, DECODE_TOKENS, times)])
        return [1e6 * (b - a) for a, b in pairwise(times)]

    def prefill(self, length: int) -> float:
        """Return the microseconds from submission to the first token."""
        time.sleep(PAUSE_S)
        times: list[float] = []
        start = time.perf_counter()
        _read([self._open(length, 2, times)])
        return 1e6 * (times[0] - start)

    def prefill_beside_streams(self, length: int) -> None:
        """Let a prompt come while three streams run: its chunks share their steps."""
        times: list[float] = []
        streams = [self._open(4, 3 * DECODE_TOKENS, times) for _ in range(3)]
        while len(times) < 6:
            time.sleep(PAUSE_S / 10)
        _read([*streams, self._open(length, 2, [])])

    def arrivals_beside_streams(self) -> None:
        """Let short requests come one after the other while three streams run."""
        times: list[float] = []
        streams = [self._open(4, 6 * DECODE_TOKENS, times) for _ in range(3)]
        while len(times) < 6:
            time.sleep(PAUSE_S / 10)
        for i in range(NUM_ARRIVALS):
            time.sleep(PAUSE_S / 4)
            streams.append(self._open(2 + 5 * i % 24, 2, []))
        _read(streams)


def _read(streams: list[Any]) -> None:
    for stream in streams:
        for _ in stream:
            pass
