"""The scheduler's laws under random and exhaustive traces, against a small model (R5, R6)."""

from __future__ import annotations

import os

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aios_compile.runtime.events import Abort, Arrive, Calibrate, Commit, Preempt, Schedule
from aios_compile.runtime.policies import RANKS
from aios_compile.runtime.schedule_state import SchedulerOptions, SchedulerState
from aios_compile.runtime.scheduler import replay, transition
from tests.runtime.fake_executor import limits
from tests.runtime.world import World

NUM_EXAMPLES = int(os.environ.get("SCHEDULER_EXAMPLES", "300"))  # nightly: 5,000 of 100 steps
NUM_STEPS = int(os.environ.get("SCHEDULER_STEPS", "50"))
BASE = [0, 1, 1, 2, 0, 1, 2, 2, 1, 0, 0, 2, 1]


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps, ends, aborts, preemptions in a small pool."""

    @initialize(
        policy=st.sampled_from(sorted(RANKS)),
        cache=st.booleans(),
        window=st.sampled_from([None, 3]),
        host=st.sampled_from([0, 9]),
        chunk=st.sampled_from([None, 2]),
    )
    def begin(
        self, policy: str, cache: bool, window: int | None, host: int, chunk: int | None
    ) -> None:
        small = limits(
            num_pages=8, max_num_batched_tokens=6, max_num_seqs=3, max_num_logit_rows=4,
            page_size=2, max_pages_per_sequence=7,
        )  # fmt: skip
        self.world = World(
            small,
            SchedulerOptions(
                policy=policy, enable_prefix_caching=cache, window_tokens=window,
                num_host_pages=host, chunked_prefill_size=chunk, starvation_us=60,
                quantum_tokens=4,
            ),
        )  # fmt: skip

    @rule(
        cut=st.integers(0, 12),
        own=st.lists(st.integers(0, 2), max_size=3),
        n=st.integers(1, 3),
        all_rows=st.booleans(),
        tenant=st.sampled_from(["", "a"]),
        priority=st.integers(0, 1),
        patience=st.sampled_from([None, None, 20]),
    )
    def arrive(
        self, cut: int, own: list[int], n: int, all_rows: bool, tenant: str, priority: int,
        patience: int | None,
    ) -> None:  # fmt: skip
        prompt = [*BASE[:cut], *own][:13] or [0]
        self.world.arrive(prompt, n, all_rows, tenant, priority, patience)

    @rule(
        finish=st.lists(st.integers(0, 40), max_size=3),
        drafts=st.integers(0, 3),
        accepted=st.integers(0, 3),
        errors=st.sampled_from([False, False, False, True]),
    )
    def step(self, finish: list[int], drafts: int, accepted: int, errors: bool) -> None:
        self.world.step(set(finish), drafts, accepted, errors)

    @precondition(lambda self: self.world.known)
    @rule(choice=st.integers(0, 10))
    def abort(self, choice: int) -> None:
        requests = sorted({known.request for known in self.world.known.values()})
        self.world.abort(requests[choice % len(requests)])

    @precondition(lambda self: self.world.state.running)
    @rule(choice=st.integers(0, 10), how=st.sampled_from(["auto", "swap", "recompute"]))
    def preempt(self, choice: int, how: str) -> None:
        running = self.world.state.running
        self.world.preempt(running[choice % len(running)].sequence_id, how)

    @rule()
    def expire(self) -> None:
        self.world.expire()

    @rule(num_pages=st.sampled_from([0, 1, 9]))
    def press(self, num_pages: int) -> None:
        self.world.press(num_pages)

    @rule(token_us=st.sampled_from([0.0, 9.0]))
    def calibrate(self, token_us: float) -> None:
        self.world.do(Calibrate(token_us, 1.0))

    @invariant()
    def nobody_waits_in_an_empty_pool(self) -> None:
        state = self.world.state if hasattr(self, "world") else None
        if state is not None and not state.sequences:
            pool = state.pool
            assert pool.num_free + len(pool.withheld) == state.limits.num_pages - 1

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.drain()
        assert replay(world.limits, world.records, world.options) == world.decisions


SchedulerMachine.TestCase.settings = settings(
    max_examples=NUM_EXAMPLES,
    stateful_step_count=NUM_STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
TestSchedulerMachine = SchedulerMachine.TestCase


# (prompt, samples, priority): two kinds of requests; the second begins like the first.
KINDS = [((0, 1, 2, 0), 1, 1), ((0, 1, 2), 2, 0)]
TINY = limits(num_pages=7, page_size=2, max_num_batched_tokens=4, max_num_seqs=3)
CASES = {
    "counts only": (SchedulerOptions(enable_prefix_caching=False), 1000),
    "priority, swap": (
        SchedulerOptions("priority", enable_prefix_caching=False, num_host_pages=3), 1000,
    ),
    "window": (SchedulerOptions(enable_prefix_caching=False, window_tokens=2), 1000),
    "prefix cache": (SchedulerOptions(), 1000),
}  # fmt: skip
MOST_STATES = int(os.environ.get("SCHEDULER_STATES", "2500"))


@pytest.mark.parametrize("name", CASES)
def test_exhaustive_search_of_a_tiny_world(name: str) -> None:
    """Every order of arrivals, ends, aborts and preemptions of at most three requests, six pages.

    The number of states is finite; `make test` visits the first of them, the nightly all.
    """
    options, least = CASES[name]
    start = SchedulerState.empty(TINY, options, b"key")
    seen, frontier, num_states = {_key(start)}, [start], 0
    while frontier and num_states < MOST_STATES:
        state = frontier.pop()
        num_states += 1
        for following in _neighbours(state):
            following.check_integrity()
            if (key := _key(following)) not in seen:
                seen.add(key)
                frontier.append(following)
    print(f"{name}: {num_states} states, {len(frontier)} left")
    assert num_states > least or not frontier
    if MOST_STATES > 100_000:
        assert not frontier, f"{num_states} states, {len(frontier)} left"


def _neighbours(state: SchedulerState) -> list[SchedulerState]:
    found = []
    next_id = max(state.sequences, default=-1) + 1
    if next_id < 4 and len({s.request_id for s in state.sequences.values()}) < 3:
        for prompt, n, priority in KINDS:
            arrive = Arrive(next_id, next_id, len(prompt), n, tokens=prompt, priority=priority)
            found.append(transition(state, arrive, 0)[0])
    for request in {s.request_id for s in state.sequences.values()}:
        found.append(transition(state, Abort(request), 0)[0])
    for sequence in state.running:
        for how in ("swap", "recompute") if state.host is not None else ("recompute",):
            found.append(transition(state, Preempt(sequence.sequence_id, how), 0)[0])
    planned, plan = transition(state, Schedule(), 0)
    if not plan.chunks:
        assert not state.sequences, "work, but nothing is planned"
        return found
    sequences = [planned.sequences[c.sequence_id] for c in plan.chunks]
    ends = [
        s.sequence_id
        for s, c in zip(sequences, plan.chunks)
        if c.start + c.num_tokens == s.num_tokens
    ]
    full = [i for i in ends if planned.sequences[i].num_tokens >= 6]
    for finished in (full, ends, *([i] for i in ends)):
        sampled = tuple((s.num_tokens % 2,) if s.sequence_id in ends else () for s in sequences)
        event = Commit(tuple((i, "stop") for i in {*finished, *full}), sampled)
        found.append(transition(planned, event, 0)[0])
    return found


def _key(state: SchedulerState) -> tuple[object, ...]:
    """Name pages by their order of use: two states that differ in page numbers only are one."""
    names: dict[int, int] = {0: 0}
    rows: list[object] = []
    for i, s in sorted(state.sequences.items()):
        pages = tuple(names.setdefault(p, len(names)) for p in s.pages)
        rows.append(
            (i, s.request_id, s.num_tokens, s.num_computed, s.running, s.forks_from, pages,
             s.num_swapped, s.is_finite, len(s.serials))
        )  # fmt: skip
    cached = tuple(names.setdefault(p, len(names)) for p in state.pool.cached)
    entries: list[object] = []
    if state.pool.cache is not None:
        by_serial = {e.serial: names[e.page] for e in state.pool.cache.by_page.values()}
        for entry in state.pool.cache.by_page.values():
            parent = -1 if entry.parent == 0 else by_serial.get(entry.parent, -2)
            entries.append((names[entry.page], entry.tokens, parent))
    siblings = tuple(sorted((k, tuple(v)) for k, v in state.siblings.items()))
    return (tuple(rows), cached, tuple(sorted(entries, key=repr)), siblings)
