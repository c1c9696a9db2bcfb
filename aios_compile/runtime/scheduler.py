"""Continuous batching as a pure function: (state, event, now) -> (state, plan).

No clock, no tensors, no randomness (nothing is drawn, so no seed either): the same events give the
same decisions, which is what `replay` checks. This file says what events do; planner.py plans a
step, policies.py orders who goes first, block_manager.py and preemption.py give and take pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aios_compile.runtime import block_manager, policies, preemption
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.decisions import Decision
from aios_compile.runtime.events import (
    Abort,
    Arrive,
    Commit,
    Event,
    Expire,
    MemoryPressure,
    Preempt,
    Schedule,
    event_from_record,
)
from aios_compile.runtime.planner import plan_step
from aios_compile.runtime.schedule_state import (
    Chunk,
    Costs,
    Plan,
    SchedulerOptions,
    SchedulerState,
    SequenceState,
)
from aios_compile.runtime.step_context import StepContext


def transition(state: SchedulerState, event: Event, now_us: int) -> tuple[SchedulerState, Plan]:
    """Return the next state and the plan; `state` stays as it was."""
    following = state.copy()
    return following, advance(following, event, now_us)


def advance(state: SchedulerState, event: Event, now_us: int) -> Plan:
    """Do the same in place, for the owner of the state. Only Schedule plans chunks."""
    ctx = StepContext(state, now_us)
    if isinstance(event, Schedule):
        plan_step(ctx, event)
    elif isinstance(event, Commit):
        _commit(ctx, event)
    elif isinstance(event, Arrive):
        _arrive(ctx, event)
    elif isinstance(event, Abort):
        _abort(ctx, event)
    elif isinstance(event, Preempt):
        preemption.on_request(ctx, event)
    elif isinstance(event, Expire):
        _expire(ctx)
    elif isinstance(event, MemoryPressure):
        preemption.withhold(ctx, event)
    else:
        state.costs = Costs(event.token_us, event.page_copy_us)
    return ctx.plan


def replay(
    limits: Limits, records: Iterable[dict[str, Any]], options: SchedulerOptions | None = None
) -> list[Decision]:
    """Make the decisions of logged events again, from an empty state."""
    state = SchedulerState.empty(limits, options)
    decisions: list[Decision] = []
    for record in records:
        decisions += advance(state, *event_from_record(record)).decisions
    return decisions


# ---- events


def _arrive(ctx: StepContext, event: Arrive) -> None:
    state, first = ctx.state, event.sequence_id
    cacheable = state.pool.cache is not None and event.samples and bool(event.tokens)
    num_known = event.num_prompt_tokens + event.num_output_tokens
    assert not event.tokens or len(event.tokens) == num_known
    for i in range(event.num_sequences):
        sequence = SequenceState(
            sequence_id=first + i,
            request_id=event.request_id,
            num_prompt_tokens=event.num_prompt_tokens,
            num_tokens=num_known,
            all_rows=event.all_rows and i == 0,
            samples=event.samples,
            forks_from=first if i else None,
            tenant=event.tenant,
            priority=event.priority,
            max_tokens=event.max_tokens,
            arrived_us=ctx.now_us,
            deadline_us=event.deadline_us,
            tokens=list(event.tokens) if cacheable else None,
        )
        assert first + i not in state.sequences
        state.sequences[first + i] = sequence
        policies.join_tenant(state, sequence)
        policies.enqueue(state, sequence)
    ids = tuple(range(first, first + event.num_sequences))
    if event.num_sequences > 1:
        state.siblings[first] = list(ids[1:])
    ctx.log("arrive", ids, "admission passed", prompt_tokens=event.num_prompt_tokens)


def _abort(ctx: StepContext, event: Abort) -> None:
    reasons = {"abort": "the caller asked for it", "disconnect": "the caller is gone"}
    sequences = ctx.state.sequences.values()
    found = [s for s in sequences if s.request_id == event.request_id]
    _drop(ctx, found, "abort", reasons[event.reason])


def _expire(ctx: StepContext) -> None:
    sequences = ctx.state.sequences.values()
    late = [s for s in sequences if s.deadline_us is not None and s.deadline_us <= ctx.now_us]
    ctx.plan.expired += dict.fromkeys(s.request_id for s in late)
    _drop(ctx, late, "expire", "its time is over")


def _drop(ctx: StepContext, found: list[SequenceState], kind: str, reason: str) -> None:
    assert ctx.state.in_flight is None, "pages of a running step cannot be given away"
    for sequence in found:
        _remove(ctx.state, sequence)
    if found:
        ctx.log(kind, tuple(s.sequence_id for s in found), reason)


def _commit(ctx: StepContext, event: Commit) -> None:
    state = ctx.state
    plan, state.in_flight = state.in_flight, None
    assert plan is not None, "a commit without a step in flight"
    finished = dict(event.finished)
    page_size, sequences = state.limits.page_size, state.sequences
    charges = state.options.policy == "fair_share"
    is_plain = state.options.window_tokens is None and not state.siblings and bool(event.sampled)
    for i, chunk in enumerate(plan.chunks):
        sequence = sequences[chunk[0]]
        # Nearly all chunks of a busy engine are the next token of a text, inside a page.
        computed = chunk[1] + 1
        if is_plain and chunk[2] == 1 == sequence.num_tokens - chunk[1] and computed % page_size:
            tokens = sequence.tokens
            if tokens is not None and sequence.is_finite and chunk[0] not in finished:
                (token,) = event.sampled[i]
                tokens.append(token)
                sequence.num_computed = computed
                sequence.num_tokens = computed + 1
                if charges:
                    policies.charge(state, sequence)
                continue
        sampled = event.sampled[i] if event.sampled else None
        _commit_chunk(ctx, sequence, chunk, sampled, finished.get(chunk.sequence_id))
    for sequence_id, reason in event.finished:
        _remove(state, state.sequences[sequence_id], keep=reason != "error")
        ctx.log("finish", (sequence_id,), reason)


def _commit_chunk(
    ctx: StepContext,
    sequence: SequenceState,
    chunk: Chunk,
    sampled: tuple[int, ...] | None,
    finished: str | None,
) -> None:
    state = ctx.state
    _accept(sequence, chunk, sampled, finished)
    if chunk.num_drafts and sampled is not None:
        true, ids = max(0, len(sampled) - 1), (chunk.sequence_id,)
        ctx.log("accept", ids, "as sampled", accepted=true, drafts=chunk.num_drafts)
    if state.options.policy == "fair_share":
        policies.charge(state, sequence)
    if sequence.is_finite and sequence.tokens is not None and finished != "error":
        num_full = sequence.num_computed // state.limits.page_size
        if num_full > len(sequence.serials):
            block_manager.publish(state, sequence, num_full)
    is_past_prompt = sequence.num_computed >= sequence.num_prompt_tokens
    # what a NaN has touched is not shared: the samples compute the prompt on their own
    if is_past_prompt and finished != "error" and chunk.sequence_id in state.siblings:
        block_manager.fork(ctx, sequence)
    window = state.options.window_tokens
    if window is not None:  # after the fork: a sample computes the last prompt token again
        block_manager.drop_left_window(ctx, sequence, window)


def _accept(
    sequence: SequenceState, chunk: Chunk, sampled: tuple[int, ...] | None, finished: str | None
) -> None:
    """Move a sequence on by what its chunk computed and sampled; drafts not accepted roll back."""
    end = chunk.start + chunk.num_tokens - chunk.num_drafts
    if sequence.all_rows:
        rows = min(end, sequence.num_prompt_rows)
        sequence.num_rows_done = max(sequence.num_rows_done, rows)
    if not sequence.samples or end < sequence.num_tokens:
        assert not sampled, "tokens for a chunk that samples none"
        sequence.num_computed = end
        return
    if sampled is None:
        sampled, sequence.tokens = (0,) * (finished is None), None
    assert len(sampled) <= 1 + chunk.num_drafts, "more tokens than rows"
    assert sampled or finished is not None, "a sampling chunk without a token goes on"
    # the KV of the accepted drafts is in the cache; the last token has none yet
    sequence.num_computed = end + max(0, len(sampled) - 1)
    sequence.num_tokens += len(sampled)
    if sequence.tokens is not None:
        sequence.tokens += sampled
    if finished != "error":
        sequence.is_finite = True


def _remove(state: SchedulerState, sequence: SequenceState, *, keep: bool = True) -> None:
    policies.dequeue(state, sequence)  # while its rank is what it was sorted by
    policies.leave_tenant(state, sequence)
    block_manager.release(state, sequence, keep=keep)
    block_manager.forget_host_copy(state, sequence)
    del state.sequences[sequence.sequence_id]
    for sibling in state.siblings.pop(sequence.sequence_id, ()):
        if sibling in state.sequences:  # they compute the prompt on their own
            state.sequences[sibling].forks_from = None
    if sequence.forks_from is not None:
        state.siblings[sequence.forks_from].remove(sequence.sequence_id)
