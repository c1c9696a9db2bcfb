"""The simulator against the real engine on a clock that an executor moves: no noise but its own."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from aios_compile.runtime import engine_core, inbox, request_meter
from aios_compile.runtime.batch import Batch, Limits
from aios_compile.runtime.engine import Engine
from aios_compile.runtime.schedule_state import SchedulerOptions
from aios_compile.study.cost_model import CostModel, fit_log
from aios_compile.study.simulator import Arrival, percentile, simulate, synthetic
from tests.runtime.test_overhead import NullExecutor

LIMITS = Limits(128, 8, 32, 40, 200, 16, 512, 1000)
OPTIONS = SchedulerOptions(chunked_prefill_size=32)
WAKE_US, ARRIVAL_US = 150, 60
WOKEN_US = 700  # the first step after a sleep takes so much more
AFTER_US, AFTER_ROW_US = 250, 12  # after the tokens of a step are there


class ClockedExecutor(NullExecutor):
    """Steps that take the time of a machine with tiles of four tokens; arrivals come meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = LIMITS
        self.now_us = 0.0
        self.rng = random.Random(1)
        self.arrivals: list[Arrival] = []
        self.streams: list[Any] = []
        self.times: list[list[float]] = []
        self.engine: Engine | None = None
        self.has_slept, self.num_rows = True, 0

    def step(self, batch: Batch) -> Any:
        tokens = batch.num_tokens
        micros = 400 + 70 * 4 * -(-min(tokens, 16) // 4) + 45 * tokens + 8 * batch.num_rows
        # attention: pairs, and keys that each sequence reads once (most of it in decodes)
        micros += 0.03 * float(batch.positions.sum()) + 0.2 * float(batch.context_lengths.sum())
        micros += WOKEN_US * self.has_slept
        self.has_slept, self.num_rows = False, batch.num_rows
        self.move(self.now_us + micros * self.rng.uniform(0.9, 1.1))
        return super().step(batch)

    def move(self, until_us: float) -> None:
        """Let the time pass, and requests come that were due."""
        assert self.engine is not None
        while self.arrivals and self.arrivals[0].at_us <= until_us:
            arrival = self.arrivals.pop(0)
            self.now_us = max(self.now_us, arrival.at_us)
            self.submit(arrival)
        self.now_us = max(self.now_us, until_us)

    def submit(self, arrival: Arrival) -> None:
        assert self.engine is not None
        times = [self.now_us]
        fields = {"max_tokens": len(arrival.output), "temperature": 0, "ignore_eos": True}
        self.streams.append(
            self.engine.open_stream(
                list(arrival.prompt), None, fields, on_change=lambda: times.append(self.now_us)
            )
        )
        self.times.append(times)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def run(name: str, arrivals: list[Arrival]) -> tuple[Path, dict[str, float]]:
        executor, path = ClockedExecutor(), tmp_path / f"{name}.jsonl"
        for module in (engine_core, inbox, request_meter):
            monkeypatch.setattr(module, "now_us", lambda: int(executor.now_us))
        with Engine(executor, options=OPTIONS, decision_sink=path) as engine:
            executor.engine, executor.arrivals = engine, list(arrivals)
            core, plain = engine._core, engine._core._take_commands

            def take() -> bool:
                if executor.num_rows:  # a step has ended; the arrivals of that time are in already
                    executor.move(executor.now_us + AFTER_US + AFTER_ROW_US * executor.num_rows)
                    executor.num_rows = 0
                is_idle = not core.state.has_work and not core.inbox.has_news
                if is_idle and executor.arrivals:
                    executor.move(executor.arrivals[0].at_us)
                    executor.now_us += WAKE_US  # the thread wakes up
                    executor.has_slept = True
                before = len(core.requests)
                taken = plain()
                executor.now_us += ARRIVAL_US * (len(core.requests) - before)
                return taken

            core._take_commands = take  # type: ignore[method-assign]
            begin = arrivals[0].at_us
            engine.generate([[1]], max_tokens=1)  # the clock starts: all others follow
            while len(executor.streams) < len(arrivals):
                time.sleep(0.001)
            for stream in executor.streams:
                for _ in stream:
                    pass
        return path, _summary(executor.times, executor.now_us - begin)

    return run


def _summary(times: list[list[float]], duration_us: float) -> dict[str, float]:
    """times: of each request, its submission and then its tokens."""
    values = {
        "ttft": [seen[1] - seen[0] for seen in times],
        "inter_token": [b - a for seen in times for a, b in pairwise(seen[1:])],
        "latency": [seen[-1] - seen[0] for seen in times],
    }
    num_tokens = sum(len(seen) - 1 for seen in times)
    found = {"output_tokens_per_s": 1e6 * num_tokens / duration_us}
    for name, micros in values.items():
        for percent in (50, 90, 99):
            found[f"{name}_p{percent}_ms"] = percentile(micros, percent) / 1e3
    return found


def test_times_are_within_a_tenth_on_other_traces(play: Any) -> None:
    def trace(kind: str, rate: float, prompt: int, output: int, shared: int, seed: int) -> Any:
        return synthetic(
            kind, 250, rate=rate, prompt_tokens=prompt, output_tokens=output, shared_tokens=shared,
            most_tokens=400, num_ids=900, seed=seed,
        )  # fmt: skip

    path, _ = play("fit", trace("poisson", 45.0, 45, 20, 16, 1))
    cost = fit_log(path)
    assert isinstance(cost, CostModel) and cost.median_error < 0.08
    for name, arrivals in {
        "busier": trace("poisson", 90.0, 15, 25, 48, 2),
        "bursts": trace("bursts", 30.0, 90, 30, 0, 3),
        "calm": trace("poisson", 8.0, 60, 40, 0, 4),
        "longer answers": trace("poisson", 20.0, 15, 80, 64, 5),
    }.items():
        _, really = play(name, arrivals)
        simulated = simulate(arrivals, LIMITS, OPTIONS, cost).summary()
        for key, value in really.items():
            assert simulated[key] == pytest.approx(value, rel=0.1), (name, key)
