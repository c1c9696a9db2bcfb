"""Continuous batching as a pure function: (state, event, now) -> (state, plan).

No clock, no tensors, no randomness (nothing is drawn, so no seed either): the same events give the
same decisions, which is what `replay` checks. One step takes, under the limits on tokens, rows and
sequences:

1. one token of every running sequence that has one left (decodes), oldest first;
2. drafts for them to verify, as far as budgets and free pages go;
3. chunks of the prompts that are running, oldest first;
4. new sequences in order of arrival, if the pages of all their tokens are free; they begin after
   what the prefix cache knows.

When a decode finds no page, the sequence that arrived last gives all of its pages back and is
computed again later. Sampling is seeded by (request, position), so nobody sees it. Progress: the
oldest sequence is never preempted while another one holds a page, and admission has checked that it
fits alone. The policy is vLLM's first-come-first-served with recompute.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from typing import Any

from aios_compile.runtime import block_manager, preemption
from aios_compile.runtime.batch import TRASH_PAGE, Limits
from aios_compile.runtime.decisions import Decision
from aios_compile.runtime.events import (
    Abort,
    Arrive,
    Commit,
    Event,
    Schedule,
    event_from_record,
)
from aios_compile.runtime.preemption import BY_ID
from aios_compile.runtime.schedule_state import (
    Chunk,
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
        _schedule(ctx, event)
    elif isinstance(event, Commit):
        _commit(ctx, event)
    elif isinstance(event, Arrive):
        _arrive(ctx, event)
    elif isinstance(event, Abort):
        _abort(ctx, event)
    else:
        assert state.in_flight is None, "pages of a running step cannot be given away"
        preemption.preempt(ctx, state.sequences[event.sequence_id], "asked for")
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
            tokens=list(event.tokens) if cacheable else None,
        )
        assert first + i not in state.sequences
        state.sequences[first + i] = sequence
        insort(state.waiting, sequence, key=BY_ID)
    ids = tuple(range(first, first + event.num_sequences))
    if event.num_sequences > 1:
        state.siblings[first] = list(ids[1:])
    ctx.log("arrive", ids, "admission passed", prompt_tokens=event.num_prompt_tokens)


def _abort(ctx: StepContext, event: Abort) -> None:
    state = ctx.state
    assert state.in_flight is None, "pages of a running step cannot be given away"
    found = [s for s in state.sequences.values() if s.request_id == event.request_id]
    for sequence in found:
        _remove(state, sequence)
    if found:
        reasons = {"abort": "the caller asked for it", "disconnect": "the caller is gone"}
        ctx.log("abort", tuple(s.sequence_id for s in found), reasons[event.reason])


def _commit(ctx: StepContext, event: Commit) -> None:
    state = ctx.state
    plan, state.in_flight = state.in_flight, None
    assert plan is not None, "a commit without a step in flight"
    finished = dict(event.finished)
    page_size, window = state.limits.page_size, state.options.window_tokens
    for i, chunk in enumerate(plan.chunks):
        sequence = state.sequences[chunk.sequence_id]
        sampled = event.sampled[i] if event.sampled else None
        _accept(sequence, chunk, sampled, finished.get(chunk.sequence_id))
        if chunk.num_drafts and sampled is not None:
            true, ids = max(0, len(sampled) - 1), (chunk.sequence_id,)
            ctx.log("accept", ids, "as sampled", accepted=true, drafts=chunk.num_drafts)
        if sequence.is_finite and sequence.tokens is not None:
            num_full = sequence.num_computed // page_size
            if num_full > len(sequence.serials) and finished.get(chunk.sequence_id) != "error":
                block_manager.publish(state, sequence, num_full)
        is_past_prompt = sequence.num_computed >= sequence.num_prompt_tokens
        if is_past_prompt and chunk.sequence_id in state.siblings:
            block_manager.fork(ctx, sequence)
        if window is not None:  # after the fork: a sample computes the last prompt token again
            block_manager.drop_left_window(ctx, sequence, window)
    for sequence_id, reason in event.finished:
        _remove(state, state.sequences[sequence_id], keep=reason != "error")
        ctx.log("finish", (sequence_id,), reason)


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


def _schedule(ctx: StepContext, event: Schedule) -> None:
    state, plan = ctx.state, ctx.plan
    assert state.in_flight is None, "the step before has not been committed"
    _decodes(ctx)
    if event.drafts:
        _drafts(ctx, dict(event.drafts))
    _running_prompts(ctx)
    # No newcomer while pages are short; but a younger sequence that ran alone may have given way to
    # samples that wait and hold pages, and then one of them begins.
    if not plan.preempted or not plan.chunks:
        _admissions(ctx)
    if plan.chunks:
        state.in_flight = plan
        state.step += 1


# ---- the parts of a step


def _decodes(ctx: StepContext) -> None:
    plan, pool, page_size = ctx.plan, ctx.state.pool, ctx.state.limits.page_size
    chunks, ids, counts = plan.chunks, [], pool.reference_counts
    indexed = () if pool.cache is None else pool.cache.by_page
    for sequence in list(ctx.state.running):
        start = sequence.num_computed
        if sequence.num_tokens - start != 1 or not sequence.running:
            continue  # a prompt, or preempted just now
        index, pages = start // page_size, sequence.pages
        page = pages[index] if index < len(pages) else TRASH_PAGE
        is_own = counts[page] == 1 and page not in indexed  # nobody holds the trash page
        if not is_own and not _make_room(ctx, sequence):
            continue
        rows = sequence.num_rows(start, start + 1) if sequence.all_rows else int(sequence.samples)
        chunks.append(Chunk(sequence.sequence_id, start, 1, rows))
        plan.num_rows += rows
        ids.append(sequence.sequence_id)
    plan.num_tokens += len(ids)
    plan.num_decodes = len(ids)
    if ids:
        ctx.log("decode", tuple(ids), "running")


def _drafts(ctx: StepContext, wanted: dict[int, int]) -> None:
    """Lengthen decodes by drafts. They only use what is left over: free pages, tokens and rows."""
    state, plan, limits = ctx.state, ctx.plan, ctx.state.limits
    place = {chunk.sequence_id: i for i, chunk in enumerate(plan.chunks)}
    for sequence_id, num_drafts in wanted.items():
        if sequence_id not in place:
            continue
        sequence, chunk = state.sequences[sequence_id], plan.chunks[place[sequence_id]]
        if not sequence.samples or chunk.num_rows != 1:
            continue
        count = min(
            num_drafts,
            limits.max_num_batched_tokens - plan.num_tokens,
            limits.max_num_logit_rows - plan.num_rows,
            # a draft at the last position of the page table has a place, its successor has none
            limits.max_pages_per_sequence * limits.page_size - chunk.start - 1,
        )
        while (chunk.start + count) // limits.page_size >= len(sequence.pages) and count > 0:
            # those who run keep a page each in reserve, as newcomers leave them one
            if state.pool.num_free <= len(state.running):
                count = len(sequence.pages) * limits.page_size - chunk.start - 1
            else:
                sequence.pages.append(block_manager.allocate(ctx))
        if count > 0:
            plan.chunks[place[sequence_id]] = Chunk(
                sequence_id, chunk.start, 1 + count, 1 + count, count
            )
            plan.num_tokens += count
            plan.num_rows += count
            ctx.log("draft", (sequence_id,), "to verify", tokens=count, asked=num_drafts)


def _running_prompts(ctx: StepContext) -> None:
    for sequence in ctx.state.running:
        if sequence.num_tokens - sequence.num_computed > 1:
            _add_prompt_chunk(ctx, sequence)


def _admissions(ctx: StepContext) -> None:
    state, pool = ctx.state, ctx.state.pool
    place = 0
    while place < len(state.waiting):
        sequence = state.waiting[place]
        if sequence.forks_from is not None:
            place += 1  # its prompt is being computed by another one; it holds nobody up
            continue
        if not _fits_batch(ctx, sequence):
            break
        hit = block_manager.find_hit(state, sequence)
        if block_manager.is_being_computed(state, sequence, hit):
            ctx.log_wait(sequence, "its prefix is being computed")
            place += 1
            continue
        need = block_manager.pages_needed(state, sequence, hit)
        if not state.running:
            preemption.drop_waiting_holders(ctx, sequence, need)
            hit = block_manager.find_hit(state, sequence)
            need = block_manager.pages_needed(state, sequence, hit)
            assert pool.num_free >= need, "admission let in a sequence that never fits"
        elif pool.num_free < need + len(state.running):  # each running one may need a page soon
            ctx.log_wait(sequence, "pages", need=need, free=pool.num_free)
            break
        block_manager.take(ctx, sequence, hit)
        del state.waiting[place]
        sequence.running = True
        ctx.plan.admitted.append(sequence.sequence_id)
        insort(state.running, sequence, key=BY_ID)
        ids = (sequence.sequence_id,)
        ctx.log("admit", ids, "first in the queue", pages=len(sequence.pages))
        _add_prompt_chunk(ctx, sequence)


# ---- helpers


def _fits_batch(ctx: StepContext, sequence: SequenceState) -> bool:
    running = len(ctx.state.running)
    if running >= ctx.state.limits.max_running:
        ctx.log_wait(sequence, "max_num_seqs", running=running)
    elif _chunk_size(ctx, sequence) == 0:
        ctx.log_wait(sequence, "token or row budget", tokens=ctx.plan.num_tokens)
    else:
        return True
    return False


def _chunk_size(ctx: StepContext, sequence: SequenceState) -> int:
    """Return how many of the sequence's next tokens the budgets of this step still take."""
    limits, plan, start = ctx.state.limits, ctx.plan, sequence.num_computed
    rows_left = limits.max_num_logit_rows - plan.num_rows
    tokens_left = limits.max_num_batched_tokens - plan.num_tokens
    bound = ctx.state.options.chunked_prefill_size
    if bound is not None and plan.num_decodes:
        tokens_left = min(tokens_left, bound - plan.num_prefill_tokens)
    end = min(sequence.num_tokens, start + tokens_left)
    if sequence.num_rows_done < sequence.num_prompt_rows:
        end = min(end, max(start, sequence.num_rows_done) + rows_left)
    if sequence.num_rows(start, end) > rows_left:  # the sampled row does not fit any more
        end -= 1
    return max(0, end - start)


def _add_prompt_chunk(ctx: StepContext, sequence: SequenceState) -> None:
    size = _chunk_size(ctx, sequence)
    if not size:
        return
    plan, start = ctx.plan, sequence.num_computed
    left = sequence.num_tokens - start - size
    reason = "cut by the budget of tokens or rows" if left else "to the last token"
    ctx.log("chunk", (sequence.sequence_id,), reason, start=start, tokens=size)
    rows = sequence.num_rows(start, start + size)
    plan.chunks.append(Chunk(sequence.sequence_id, start, size, rows))
    plan.num_tokens += size
    plan.num_prefill_tokens += size
    plan.num_rows += rows


def _make_room(ctx: StepContext, sequence: SequenceState) -> bool:
    """Let the sequence own the page of its next token; False if it had to give up itself."""
    pool, page_size = ctx.state.pool, ctx.state.limits.page_size
    index = sequence.num_computed // page_size
    while index == len(sequence.pages) or pool.is_shared(sequence.pages[index]):
        if pool.num_free:
            if index == len(sequence.pages):
                sequence.pages.append(block_manager.allocate(ctx))
            else:
                block_manager.own_page_of(ctx, sequence, sequence.num_computed)
            return True
        victim = preemption.latest_holder(ctx)
        preemption.preempt(ctx, victim, f"sequence {sequence.sequence_id} needs a page")
        if victim is sequence:
            return False
    block_manager.own_page_of(ctx, sequence, sequence.num_computed)
    return True


def _remove(state: SchedulerState, sequence: SequenceState, *, keep: bool = True) -> None:
    block_manager.release(state, sequence, keep=keep)
    (state.running if sequence.running else state.waiting).remove(sequence)
    del state.sequences[sequence.sequence_id]
    for sibling in state.siblings.pop(sequence.sequence_id, ()):
        if sibling in state.sequences:  # they compute the prompt on their own
            state.sequences[sibling].forks_from = None
    if sequence.forks_from is not None:
        state.siblings[sequence.forks_from].remove(sequence.sequence_id)
