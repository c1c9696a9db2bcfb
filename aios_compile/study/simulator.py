"""An engine without a model: arrivals, the real scheduler, and a clock that a cost model moves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aios_compile.errors import ConfigError, LogError
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.events import Arrive, Commit, Schedule
from aios_compile.runtime.replay import follow, read_records
from aios_compile.runtime.schedule_state import Plan, SchedulerOptions, SchedulerState
from aios_compile.runtime.scheduler import advance
from aios_compile.study.cost_model import CostModel, is_changed

BURST = 8  # requests of a burst, which come at once


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, its prompt, and the tokens that it will be given."""

    at_us: float
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    tenant: str = ""
    priority: int = 0


@dataclass
class Simulation:
    """What happened. Times in microseconds; one entry a request, or one a gap."""

    ttft_us: list[float] = field(default_factory=list)
    inter_token_us: list[float] = field(default_factory=list)
    latency_us: list[float] = field(default_factory=list)
    timeline: list[tuple[float, int, int, int]] = field(default_factory=list)  # see columns below
    num_steps: int = 0
    num_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    duration_us: float = 0.0

    COLUMNS = ("at_us", "running", "waiting", "pages")

    def summary(self) -> dict[str, float]:
        """Return the numbers that one asks for first."""
        seconds = max(self.duration_us, 1.0) / 1e6
        values: dict[str, float] = {
            "requests": len(self.latency_us),
            "steps": self.num_steps,
            "duration_s": seconds,
            "output_tokens_per_s": self.num_output_tokens / seconds,
            "computed_tokens_per_s": self.num_tokens / seconds,
            "cached_tokens": self.num_cached_tokens,
            "preemptions": self.num_preemptions,
        }
        for name in ("ttft_us", "inter_token_us", "latency_us"):
            for percent in (50, 90, 99):
                short = f"{name.removesuffix('_us')}_p{percent}_ms"
                values[short] = percentile(getattr(self, name), percent) / 1e3
        return values


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def simulate(
    arrivals: Sequence[Arrival], limits: Limits, options: SchedulerOptions, cost: CostModel
) -> Simulation:
    """Play the arrivals, which are sorted by time, until all have ended.

    Raises ConfigError, as admission would, for one that can never have its pages.
    """
    most = min(limits.capacity_tokens, limits.max_model_len)
    longest = max((len(a.prompt) + len(a.output) - 1 for a in arrivals), default=0)
    if longest > most:
        raise ConfigError(f"a request has {longest} tokens in the cache, expected at most {most}")
    run = _Run(arrivals, SchedulerState.empty(limits, options, b"simulate"), cost)
    while run.next_arrival < len(arrivals) or run.state.has_work:
        run.deliver()
        if run.state.has_work:
            run.step()
        else:
            run.now_us = arrivals[run.next_arrival].at_us + cost.wake_us
            run.before = None
    run.result.duration_us = run.now_us - (arrivals[0].at_us if arrivals else 0.0)
    return run.result


class _Run:
    def __init__(self, arrivals: Sequence[Arrival], state: SchedulerState, cost: CostModel) -> None:
        self.arrivals, self.state, self.cost = arrivals, state, cost
        self.result = Simulation()
        self.now_us = arrivals[0].at_us if arrivals else 0.0
        self.next_arrival = 0
        self.before: Plan | None = None  # the last step; None: it slept before the next one
        self.is_busy = False  # a step ended just now: what arrived meanwhile delays the next one
        self.random = random.Random(0)
        self.num_given: dict[int, int] = {}
        self.last_us: dict[int, float] = {}

    def deliver(self) -> None:
        while self.next_arrival < len(self.arrivals):
            number, arrival = self.next_arrival, self.arrivals[self.next_arrival]
            if arrival.at_us > self.now_us:
                return
            event = Arrive(
                number,
                number,
                len(arrival.prompt),
                tokens=arrival.prompt,
                tenant=arrival.tenant,
                priority=arrival.priority,
                max_tokens=len(arrival.output),
            )
            advance(self.state, event, int(self.now_us))
            self.now_us += self.cost.arrival(len(arrival.prompt)) if self.is_busy else 0.0
            self.num_given[number] = 0
            self.next_arrival += 1

    def step(self) -> None:
        plan = advance(self.state, Schedule(), int(self.now_us))
        changed = is_changed(plan, self.before)
        until_us, taken_us = self.cost.drawn(plan, self.random, self.before is None, changed)
        given_us, self.before = self.now_us + until_us, plan
        self.now_us += taken_us
        sampled: list[tuple[int, ...]] = []
        finished: list[tuple[int, str]] = []
        for chunk in plan.chunks:
            number, sequence = chunk.sequence_id, self.state.sequences[chunk.sequence_id]
            if chunk.start + chunk.num_tokens < sequence.num_tokens:
                sampled.append(())
                continue
            output = self.arrivals[number].output
            sampled.append(output[self.num_given[number] : self.num_given[number] + 1])
            self._token(number, given_us)
            if self.num_given[number] == len(output):
                finished.append((number, "length"))
        advance(self.state, Commit(tuple(finished), tuple(sampled)), int(self.now_us))
        self.is_busy = self.state.has_work
        self._count(plan)

    def _token(self, number: int, at_us: float) -> None:
        result, arrived_us = self.result, self.arrivals[number].at_us
        if self.num_given[number]:
            result.inter_token_us.append(at_us - self.last_us[number])
        else:
            result.ttft_us.append(at_us - arrived_us)
        self.num_given[number] += 1
        self.last_us[number] = at_us
        result.num_output_tokens += 1
        if self.num_given[number] == len(self.arrivals[number].output):
            result.latency_us.append(at_us - arrived_us)

    def _count(self, plan: Plan) -> None:
        result, state = self.result, self.state
        result.num_steps += 1
        result.num_tokens += plan.num_tokens
        result.num_cached_tokens += sum(count for _, count in plan.hits)
        result.num_preemptions += len(plan.preempted)
        pages = state.pool.num_pages - 1 - state.pool.num_free
        point = (self.now_us, len(state.running), len(state.waiting), pages)
        result.timeline.append(point)


def synthetic(
    kind: str,
    count: int,
    *,
    rate: float,
    prompt_tokens: int,
    output_tokens: int,
    shared_tokens: int,
    most_tokens: int,
    num_tenants: int = 1,
    num_ids: int = 1 << 40,
    seed: int = 0,
) -> list[Arrival]:
    """Return `count` arrivals: "poisson" at `rate` a second, or "bursts" of 8 at the same rate.

    Lengths are geometric-like around their means (exponential, rounded up); every prompt begins
    with the tenant's shared tokens. most_tokens: prompt and output together are cut to fit.
    num_ids: token ids are below it (a real engine can be given the same prompts).
    """
    rng = random.Random(seed)
    prefixes = [_ids(rng, shared_tokens, num_ids) for _ in range(num_tenants)]
    arrivals, at_us = [], 0.0
    for i in range(count):
        if kind == "poisson":
            at_us += rng.expovariate(rate) * 1e6
        elif i % BURST == 0:
            at_us += rng.expovariate(rate / BURST) * 1e6
        tenant = rng.randrange(num_tenants)
        own = 1 + int(rng.expovariate(1 / max(1, prompt_tokens)))
        prompt = [*prefixes[tenant], *(rng.randrange(num_ids) for _ in range(own))][
            : most_tokens - 1
        ]
        wanted = 1 + int(rng.expovariate(1 / max(1, output_tokens)))
        output = tuple(
            rng.randrange(num_ids) for _ in range(min(wanted, most_tokens - len(prompt)))
        )
        arrivals.append(Arrival(at_us, tuple(prompt), output, f"tenant {tenant}"))
    return arrivals


def _ids(rng: random.Random, count: int, num_ids: int) -> list[int]:
    return [rng.randrange(num_ids) for _ in range(count)]


def recorded(path: Path) -> tuple[Limits, SchedulerOptions, list[Arrival], Simulation]:
    """Return a log's arrivals with what they were given, and what really happened.

    Requests that sampled nothing (logits, aborted ones before their first token) are left out, and
    n completions of one prompt come as n requests. Raises LogError for a log with speculation.
    """
    limits, options, events = read_records(path)
    state = SchedulerState.empty(limits, options, b"read")
    arrived: dict[int, tuple[float, Arrive]] = {}
    outputs: dict[int, list[int]] = {}
    times: dict[int, list[float]] = {}
    result, end_us = Simulation(), 0.0
    for logged in events:
        event, plan = logged.event, state.in_flight
        if isinstance(event, Schedule) and event.drafts:
            raise LogError(
                f"{path}:{logged.line}: the log has drafts, and speculation is not simulated",
                advice="record it without speculative_config",
            )
        if isinstance(event, Arrive):
            came_us = logged.now_us if event.submitted_us is None else event.submitted_us
            for i in range(event.num_sequences):
                arrived[event.sequence_id + i] = (came_us, event)
        if isinstance(event, Commit) and plan is not None:
            for chunk, tokens in zip(plan.chunks, event.sampled):
                outputs.setdefault(chunk.sequence_id, []).extend(tokens)
                times.setdefault(chunk.sequence_id, []).extend([logged.now_us] * len(tokens))
            result.num_steps += 1
            result.num_tokens += plan.num_tokens
            end_us = logged.now_us
        made = follow(path, state, logged)
        result.num_preemptions += len(made.preempted)
        result.num_cached_tokens += sum(count for _, count in made.hits)
    arrivals = []
    for number, (at_us, event) in arrived.items():
        if not outputs.get(number):
            continue
        prompt = event.tokens or tuple(-number * 4096 - k for k in range(event.num_prompt_tokens))
        output = tuple(outputs[number])
        arrivals.append(Arrival(at_us, prompt, output, event.tenant, event.priority))
        result.ttft_us.append(times[number][0] - at_us)
        result.latency_us.append(times[number][-1] - at_us)
        pairs = zip(times[number], times[number][1:])
        result.inter_token_us += [later - earlier for earlier, later in pairs]
        result.num_output_tokens += len(output)
    if arrivals:
        result.duration_us = end_us - arrivals[0].at_us
    return limits, options, arrivals, result
