"""Who goes first: first come first served, priority, fair share by tenant, shortest remaining.

`rank` orders sequences: the smallest begins first, and the largest gives its pages back first. It
changes only at a commit, so one step sees one order. The sequence of the smallest rank is never
preempted while another one holds a page, and it grows no older in any policy (its remaining tokens
only get fewer), so something always comes to its end. Nobody starves either: who has waited for
`starvation_us` is promoted, and goes before all others, the oldest first, until it ends.

Fair share is deficit round robin (Shreedhar and Varghese 1996), in tokens computed: cached tokens
are free, a recompute is not charged again, and what a sequence decodes is charged to its tenant
afterwards, so deficits may fall below zero. It decides who is admitted; under a shortage of pages
the order of arrival decides.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from aios_compile.runtime.schedule_state import SchedulerState, SequenceState, TenantShare

Rank = tuple[int, ...]


def _by_arrival(s: SequenceState) -> Rank:
    return (not s.promoted, s.sequence_id)


def _by_priority(s: SequenceState) -> Rank:
    return (not s.promoted, s.priority, s.sequence_id)


def _by_remaining(s: SequenceState) -> Rank:
    """Tokens to generate, and the prompt until the first one is there.

    Without what is computed of it, which changes outside of commits. A sequence without a known end
    counts its prompt only.
    """
    to_generate = max(0, s.num_prompt_tokens + s.max_tokens - s.num_tokens)
    prompt = s.num_prompt_tokens if s.num_tokens == s.num_prompt_tokens else 0
    return (not s.promoted, prompt + to_generate, s.sequence_id)


RANKS: dict[str, Callable[[SequenceState], Rank]] = {
    "fcfs": _by_arrival,
    "priority": _by_priority,
    "fair_share": _by_arrival,
    "shortest_remaining": _by_remaining,
}
BY_ID: Callable[[SequenceState], Any] = attrgetter("sequence_id")


def rank(state: SchedulerState) -> Callable[[SequenceState], Rank]:
    """Return the order of the state's policy as a sort key."""
    return RANKS[state.options.policy]


def enqueue(state: SchedulerState, sequence: SequenceState) -> None:
    """Put a sequence among the waiting ones, which are sorted by rank."""
    insort(state.waiting, sequence, key=rank(state))
    if state.options.policy != "fcfs" and not sequence.promoted:
        due_us = sequence.arrived_us + state.options.starvation_us
        state.next_promotion_us = min(state.next_promotion_us, due_us)


def dequeue(state: SchedulerState, sequence: SequenceState) -> None:
    """Take a sequence out of the queue that it is in."""
    if sequence.running:
        queue, key = state.running, BY_ID
    else:
        queue, key = state.waiting, RANKS[state.options.policy]
    place = bisect_left(queue, key(sequence), key=key)
    assert queue[place] is sequence, "a queue is out of order"
    del queue[place]


def promote_starved(state: SchedulerState, now_us: int) -> list[SequenceState]:
    """Promote those who have waited too long; return them."""
    if now_us < state.next_promotion_us:
        return []
    limit = state.options.starvation_us
    starved = [s for s in state.waiting if not s.promoted and now_us - s.arrived_us >= limit]
    for sequence in starved:
        sequence.promoted = True
    state.waiting.sort(key=rank(state))
    others = (s.arrived_us + limit for s in state.waiting if not s.promoted)
    state.next_promotion_us = min(others, default=state.NEVER_US)
    return starved


def in_order(state: SchedulerState, sequences: list[SequenceState]) -> list[SequenceState]:
    """Return a new list of running sequences, who goes first in front."""
    if state.options.policy == "fcfs":
        return list(sequences)  # sorted by arrival already
    return sorted(sequences, key=rank(state))


def worst_holder(state: SchedulerState) -> SequenceState:
    """Return the sequence of the largest rank that holds pages."""
    running = state.running[-1:] if state.options.policy == "fcfs" else state.running
    holders = [*running, *(s for s in state.waiting if s.pages)]
    return max(holders, key=rank(state))


def candidates(state: SchedulerState) -> Iterator[SequenceState]:
    """Yield waiting sequences in the order in which they may begin.

    The caller makes each run, or leaves it and takes the next, or stops.
    """
    if state.options.policy != "fair_share":
        yield from [s for s in state.waiting if s.forks_from is None]
        return
    queues: dict[str, deque[SequenceState]] = {}
    for sequence in state.waiting:
        if sequence.forks_from is None:
            queues.setdefault(sequence.tenant, deque()).append(sequence)
    while queues:
        tenant = _next_tenant(state, queues)
        sequence = queues[tenant].popleft()
        if not queues[tenant]:
            del queues[tenant]
        start = sequence.num_tokens
        yield sequence
        if sequence.running:
            charged_until = max(sequence.num_charged, sequence.num_computed)
            state.tenants[tenant].deficit_tokens -= max(0, start - charged_until)
            sequence.num_charged = max(sequence.num_charged, start)


def _next_tenant(state: SchedulerState, queues: dict[str, deque[SequenceState]]) -> str:
    """Return whose turn it is; rounds in which nobody can afford its next sequence are skipped."""
    promoted = [q[0] for q in queues.values() if q[0].promoted]
    if promoted:
        return min(promoted, key=BY_ID).tenant
    names = list(state.tenants)
    turn = names.index(state.last_tenant) if state.last_tenant in state.tenants else 0
    ring = [name for name in names[turn:] + names[:turn] if name in queues]
    quantum = state.options.quantum_tokens
    missing = {t: _cost(queues[t][0]) - state.tenants[t].deficit_tokens for t in ring}
    num_rounds = max(0, min(-(-tokens // quantum) for tokens in missing.values()))
    for name in ring:
        state.tenants[name].deficit_tokens += num_rounds * quantum
    state.last_tenant = next(t for t in ring if missing[t] <= num_rounds * quantum)
    return state.last_tenant


def _cost(sequence: SequenceState) -> int:
    return max(0, sequence.num_tokens - max(sequence.num_charged, sequence.num_computed))


def join_tenant(state: SchedulerState, sequence: SequenceState) -> None:
    """Count a sequence of its tenant."""
    state.tenants.setdefault(sequence.tenant, TenantShare()).num_sequences += 1


def leave_tenant(state: SchedulerState, sequence: SequenceState) -> None:
    """Count it no more; a tenant without sequences keeps neither credit nor debt."""
    share = state.tenants[sequence.tenant]
    share.num_sequences -= 1
    if not share.num_sequences:
        del state.tenants[sequence.tenant]


def charge(state: SchedulerState, sequence: SequenceState) -> None:
    """Charge what a sequence has generated since it was charged last."""
    if sequence.num_tokens > sequence.num_charged:
        count = sequence.num_tokens - sequence.num_charged
        state.tenants[sequence.tenant].deficit_tokens -= count
        sequence.num_charged = sequence.num_tokens
