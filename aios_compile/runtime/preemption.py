"""Whose pages are taken when there are too few, and how the sequence comes back.

Either it is computed again (what the prefix cache still holds of it is not), or its pages are
copied to host memory and back, whichever costs less by what steps and copies were measured to
take. Sampling is seeded by (request, position) and a recompute gives the same bits, so nobody sees
it.
"""

from __future__ import annotations

from collections.abc import Iterable

from aios_compile.runtime import policies
from aios_compile.runtime.batch import TRASH_PAGE
from aios_compile.runtime.block_manager import (
    allocate,
    evict,
    find_hit,
    forget_host_copy,
    pages_needed,
    release,
)
from aios_compile.runtime.events import MemoryPressure, Preempt
from aios_compile.runtime.schedule_state import SequenceState
from aios_compile.runtime.step_context import StepContext


def preempt(ctx: StepContext, sequence: SequenceState, reason: str, how: str = "auto") -> None:
    """Take all pages back. Never one that this step has planned: victims are later ones."""
    state, freed = ctx.state, len(sequence.pages) - sequence.num_dropped
    swaps = _can_swap(ctx, sequence) and (
        how == "swap" or (how == "auto" and _swap_costs_less(ctx, sequence))
    )
    if swaps:
        _copy_to_host(ctx, sequence)
    release(state, sequence)
    if sequence.running:
        policies.dequeue(state, sequence)
        sequence.running = False
        policies.enqueue(state, sequence)
    ctx.plan.preempted.append(sequence.sequence_id)
    kind = "swap_out" if swaps else "preempt"
    ctx.log(kind, (sequence.sequence_id,), reason, pages=freed)


def on_request(ctx: StepContext, event: Preempt) -> None:
    """Do what a Preempt event asks for."""
    assert ctx.state.in_flight is None, "pages of a running step cannot be given away"
    preempt(ctx, ctx.state.sequences[event.sequence_id], "asked for", event.how)


def _can_swap(ctx: StepContext, sequence: SequenceState) -> bool:
    host = ctx.state.host
    return sequence.running and host is not None and host.num_free >= len(_saved(ctx, sequence)) > 0


def _saved(ctx: StepContext, sequence: SequenceState) -> list[int]:
    """Return the pages that hold computed tokens and are still in the window."""
    num_pages = -(-sequence.num_computed // ctx.state.limits.page_size)
    return sequence.pages[sequence.num_dropped : num_pages]


def _swap_costs_less(ctx: StepContext, sequence: SequenceState) -> bool:
    costs, num_pages = ctx.state.costs, len(_saved(ctx, sequence))
    return 2 * num_pages * costs.page_copy_us < sequence.num_computed * costs.token_us


def _copy_to_host(ctx: StepContext, sequence: SequenceState) -> None:
    host = ctx.state.host
    assert host is not None
    for page in _saved(ctx, sequence):
        sequence.host_pages.append(host.allocate())
        ctx.plan.swap_outs.append((page, sequence.host_pages[-1]))
    sequence.num_swapped = sequence.num_computed
    sequence.num_swapped_dropped = sequence.num_dropped


def restore(ctx: StepContext, sequence: SequenceState) -> None:
    """Give a swapped sequence pages for all its tokens, and let them be copied back."""
    total = -(-sequence.num_tokens // ctx.state.limits.page_size)
    sequence.num_dropped = sequence.num_swapped_dropped
    sequence.pages = [TRASH_PAGE] * sequence.num_dropped
    sequence.pages += [allocate(ctx) for _ in range(total - sequence.num_dropped)]
    sequence.page_epoch += 1
    sequence.num_computed = sequence.num_swapped
    num_pages = len(sequence.host_pages)
    ctx.plan.swap_ins += zip(sequence.host_pages, sequence.pages[sequence.num_dropped :])
    forget_host_copy(ctx.state, sequence)
    ctx.log("swap_in", (sequence.sequence_id,), "its turn has come", pages=num_pages)


def drop_waiting_holders(ctx: StepContext, sequence: SequenceState) -> None:
    """Take the pages of waiting samples until `sequence`, which runs alone, has all it needs."""
    for other in reversed(list(ctx.state.waiting)):
        hit = find_hit(ctx.state, sequence)
        if ctx.state.pool.num_free >= pages_needed(ctx.state, sequence, hit):
            return
        if other.pages and other is not sequence:
            preempt(ctx, other, f"sequence {sequence.sequence_id} goes first", "recompute")


def make_way(ctx: StepContext) -> None:
    """Under the priority policy: preempt less urgent sequences for a more urgent one that waits."""
    state = ctx.state
    head = next(policies.candidates(state), None)
    if head is None or not state.running:
        return
    lower = sorted(
        (s for s in state.running if _urgency(s) > _urgency(head)), key=policies.rank(state)
    )
    need = pages_needed(state, head, find_hit(state, head))
    if state.pool.num_free + _pages_held(lower) < need + len(state.running) - len(lower):
        return  # all of them together would not help
    while lower:
        has_slot = len(state.running) < state.limits.max_running
        if has_slot and state.pool.num_free >= need + len(state.running):
            return
        preempt(ctx, lower.pop(), f"sequence {head.sequence_id} is more urgent")


def _urgency(sequence: SequenceState) -> tuple[bool, int]:
    return (not sequence.promoted, sequence.priority)


def _pages_held(sequences: Iterable[SequenceState]) -> int:
    return len({page for s in sequences for page in s.pages if page != TRASH_PAGE})


def withhold(ctx: StepContext, event: MemoryPressure) -> None:
    """Take pages out of use until `num_pages` are, or give them back.

    The pages of the longest sequence always stay, so that whoever was admitted still fits.
    """
    state, pool, plan = ctx.state, ctx.state.pool, ctx.plan
    assert state.in_flight is None, "pages of a running step cannot be given away"
    total = pool.num_pages - 1
    target = min(event.num_pages, total - min(total, state.limits.max_pages_per_sequence))
    while len(pool.withheld) > target:
        plan.returned.append(pool.withheld.pop())
        pool.free.append(plan.returned[-1])
    while len(pool.withheld) < target:
        if not pool.num_free:
            preempt(ctx, policies.worst_holder(state), "memory pressure")
            continue
        if not pool.free:
            evict(ctx, "memory pressure")
        plan.withheld.append(pool.free.pop())
        pool.withheld.append(plan.withheld[-1])
    ctx.log("pressure", (), "asked for", asked=event.num_pages, withheld=target)
