"""The scheduler's laws under random and exhaustive traces, against a small model (R5)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aios_compile.runtime.batch import Limits
from aios_compile.runtime.decisions import Decision
from aios_compile.runtime.events import (
    Abort,
    Arrive,
    Commit,
    Event,
    Preempt,
    Schedule,
    event_record,
)
from aios_compile.runtime.schedule_state import Plan, SchedulerState
from aios_compile.runtime.scheduler import advance, replay, transition
from tests.runtime.fake_executor import limits


@dataclass
class Known:
    """What the model knows of one sequence."""

    request: int
    prompt: int
    tokens: int
    all_rows: bool
    may_wait: bool  # a sibling, or preempted from outside: younger ones may run before it
    rows: int = 0


class World:
    """A scheduler and the model that watches it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.state = SchedulerState.empty(limits)
        self.known: dict[int, Known] = {}
        self.records: list[dict[str, object]] = []
        self.decisions: list[Decision] = []
        self.next_id = 0
        self.clock = 0

    def do(self, event: Event) -> Plan:
        self.clock += 1
        self.records.append(event_record(event, self.clock))
        plan = advance(self.state, event, self.clock)
        self.decisions += plan.decisions
        self.state.check_integrity()
        assert set(self.state.sequences) == set(self.known)
        return plan

    def arrive(self, prompt: int, n: int, all_rows: bool) -> None:
        first = self.next_id
        self.next_id += n
        for i in range(n):
            self.known[first + i] = Known(first, prompt, prompt, all_rows and i == 0, i > 0)
        self.do(Arrive(first, first, prompt, n, all_rows))

    def abort(self, request: int) -> None:
        self.known = {i: k for i, k in self.known.items() if k.request != request}
        self.do(Abort(request))

    def preempt(self, sequence: int) -> None:
        self.known[sequence].may_wait = True
        self.do(Preempt(sequence))

    def step(self, may_finish: set[int]) -> None:
        oldest = min(self.known, default=None)
        plan = self.do(Schedule())
        self.check(plan)
        if oldest is not None and not self.known[oldest].may_wait:
            assert oldest in {c.sequence_id for c in plan.chunks}, "the oldest made no progress"
        if not plan.chunks:
            assert not self.known
            return
        finished = []
        for chunk in plan.chunks:
            known = self.known[chunk.sequence_id]
            if chunk.start + chunk.num_tokens == known.tokens:
                known.tokens += 1
                full = known.tokens >= self.limits.capacity_tokens + 1
                if full or chunk.sequence_id in may_finish:
                    finished.append((chunk.sequence_id, "stop"))
                    if known.all_rows:
                        assert known.rows == known.prompt - 1, "prompt rows lost or repeated"
                    del self.known[chunk.sequence_id]
        self.do(Commit(tuple(finished)))

    def check(self, plan: Plan) -> None:
        assert sum(c.num_tokens for c in plan.chunks) == plan.num_tokens
        assert sum(c.num_rows for c in plan.chunks) == plan.num_rows
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        assert plan.num_rows <= self.limits.max_num_logit_rows
        assert len(plan.chunks) <= self.limits.max_num_seqs
        written: set[int] = set()
        for chunk in plan.chunks:
            state, known = self.state.sequences[chunk.sequence_id], self.known[chunk.sequence_id]
            end = chunk.start + chunk.num_tokens
            assert chunk.num_tokens > 0 and chunk.start == state.num_computed
            assert end <= known.tokens == state.num_tokens
            size = self.limits.page_size
            pages = state.pages[chunk.start // size : (end - 1) // size + 1]
            assert len(pages) == (end - 1) // size + 1 - chunk.start // size
            assert all(self.state.pool.reference_counts[p] == 1 for p in pages), "writes a shared"
            assert not written & set(pages)
            written |= set(pages)
            rows = chunk.num_rows - (end == known.tokens)
            if known.all_rows:
                known.rows += rows
            else:
                assert rows == 0
        targets = [target for _, target in plan.copies]
        assert len(set(targets)) == len(targets)
        alive = {page for s in self.state.sequences.values() for page in s.pages}
        assert set(targets) <= alive, "a copy for nobody"

    def fits(self, prompt: int, outputs: int) -> bool:
        return prompt + outputs - 1 <= self.limits.capacity_tokens


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps, ends, aborts, preemptions in a small pool."""

    def __init__(self) -> None:
        super().__init__()
        small = limits(
            num_pages=8, max_num_batched_tokens=6, max_num_seqs=3, max_num_logit_rows=4, page_size=2
        )
        self.world = World(small)

    @rule(prompt=st.integers(1, 13), n=st.integers(1, 3), all_rows=st.booleans())
    def arrive(self, prompt: int, n: int, all_rows: bool) -> None:
        self.world.arrive(prompt, n, all_rows)

    @rule(finish=st.lists(st.integers(0, 40), max_size=3))
    def step(self, finish: list[int]) -> None:
        self.world.step(set(finish))

    @precondition(lambda self: self.world.known)
    @rule(choice=st.integers(0, 10))
    def abort(self, choice: int) -> None:
        requests = sorted({known.request for known in self.world.known.values()})
        self.world.abort(requests[choice % len(requests)])

    @precondition(lambda self: self.world.state.running)
    @rule(choice=st.integers(0, 10))
    def preempt(self, choice: int) -> None:
        running = self.world.state.running
        self.world.preempt(running[choice % len(running)].sequence_id)

    @invariant()
    def nobody_waits_in_an_empty_pool(self) -> None:
        state = self.world.state
        if not state.sequences:
            assert state.pool.num_free == state.limits.num_pages - 1

    def teardown(self) -> None:
        for _ in range(2000):  # everything ends
            if not self.world.known:
                break
            self.world.step(set(self.world.known))
        assert not self.world.known, "requests starve"
        assert self.world.state.pool.num_free == self.world.limits.num_pages - 1
        again = replay(self.world.limits, self.world.records)  # type: ignore[arg-type]
        assert again == self.world.decisions


SchedulerMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
TestSchedulerMachine = SchedulerMachine.TestCase


def test_seeded_random_traces() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        world = World(
            limits(
                num_pages=rng.choice([4, 8, 30]),
                page_size=rng.choice([1, 2, 16]),
                max_num_batched_tokens=rng.choice([2, 5, 64]),
                max_num_seqs=rng.choice([1, 2, 8]),
                max_num_logit_rows=rng.choice([2, 8]),
            )
        )
        for _ in range(150):
            if rng.random() < 0.25:
                prompt = rng.randint(1, max(1, world.limits.capacity_tokens - 1))
                world.arrive(prompt, rng.choice([1, 1, 2, 4]), rng.random() < 0.2)
            elif rng.random() < 0.05 and world.known:
                world.abort(rng.choice(list(world.known.values())).request)
            else:
                world.step({i for i in world.known if rng.random() < 0.1})
        while world.known:
            world.step(set(world.known))
        assert replay(world.limits, world.records) == world.decisions  # type: ignore[arg-type]


def test_exhaustive_search_of_a_tiny_world() -> None:
    """Every order of arrivals, ends and aborts of at most three requests on at most six pages."""
    most = limits(num_pages=7, page_size=2, max_num_batched_tokens=4, max_num_seqs=3)
    kinds = [(4, 1), (3, 2)]  # (prompt tokens, samples)
    start = SchedulerState.empty(most)
    seen, frontier, num_states = {_key(start)}, [start], 0
    while frontier and num_states < 20000:
        state = frontier.pop()
        num_states += 1
        for following in _neighbours(state, kinds):
            following.check_integrity()
            if (key := _key(following)) not in seen:
                seen.add(key)
                frontier.append(following)
    assert num_states > 1000 and not frontier, f"{num_states} states, {len(frontier)} left"


def _neighbours(state: SchedulerState, kinds: list[tuple[int, int]]) -> list[SchedulerState]:
    found = []
    next_id = max(state.sequences, default=-1) + 1
    if next_id < 4 and len({s.request_id for s in state.sequences.values()}) < 3:
        for prompt, n in kinds:
            found.append(transition(state, Arrive(next_id, next_id, prompt, n), 0)[0])
    for request in {s.request_id for s in state.sequences.values()}:
        found.append(transition(state, Abort(request), 0)[0])
    for sequence in state.running:
        found.append(transition(state, Preempt(sequence.sequence_id), 0)[0])
    planned, plan = transition(state, Schedule(), 0)
    if not plan.chunks:
        assert not state.sequences, "work, but nothing is planned"
        return found
    ends = [
        c.sequence_id
        for c in plan.chunks
        if c.start + c.num_tokens == planned.sequences[c.sequence_id].num_tokens
    ]
    full = [i for i in ends if planned.sequences[i].num_tokens >= 6]
    for finished in (full, ends, *([i] for i in ends)):
        event = Commit(tuple((i, "stop") for i in {*finished, *full}))
        found.append(transition(planned, event, 0)[0])
    return found


def _key(state: SchedulerState) -> tuple[object, ...]:
    """Name pages by their holders: two states that differ in page numbers only are one."""
    rows = []
    for i, s in sorted(state.sequences.items()):
        shared = tuple(state.pool.reference_counts[p] for p in s.pages)
        rows.append(
            (i, s.request_id, s.num_tokens, s.num_computed, s.running, s.forks_from, shared)
        )
    return (tuple(rows), tuple(sorted((k, tuple(v)) for k, v in state.siblings.items())))
