"""Whose pages are taken when there are too few, and how the sequence comes back.

Sampling is seeded by (request, position) and a recompute gives the same bits, so nobody sees it.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from aios_compile.runtime.block_manager import find_hit, pages_needed, release
from aios_compile.runtime.schedule_state import SequenceState
from aios_compile.runtime.step_context import StepContext

BY_ID = attrgetter("sequence_id")


def latest_holder(ctx: StepContext) -> SequenceState:
    """Return the sequence that arrived last of those that hold pages."""
    holders = [s for s in ctx.state.waiting if s.pages]
    return max(ctx.state.running[-1:] + holders[-1:], key=BY_ID)


def drop_waiting_holders(ctx: StepContext, sequence: SequenceState, need: int) -> None:
    """Take the pages of waiting samples until `sequence`, which runs alone, has all it needs."""
    for other in reversed(ctx.state.waiting):
        if ctx.state.pool.num_free >= need or other is sequence:
            return
        if other.pages:
            preempt(ctx, other, f"sequence {sequence.sequence_id} is first in the queue")
            need = pages_needed(ctx.state, sequence, find_hit(ctx.state, sequence))


def preempt(ctx: StepContext, sequence: SequenceState, reason: str) -> None:
    """Take all pages back. Never one that this step has planned: victims are later ones."""
    state, freed = ctx.state, len(sequence.pages)
    release(state, sequence)
    if sequence.running:
        sequence.running = False
        state.running.remove(sequence)
        insort(state.waiting, sequence, key=BY_ID)
    ctx.plan.preempted.append(sequence.sequence_id)
    ctx.log("preempt", (sequence.sequence_id,), reason, pages=freed)
