"""Plans one step: who runs, and how many tokens.

Under the limits on tokens, rows and sequences, in the order of the policy:

1. one token of every running sequence that has one left (decodes);
2. chunks of the prompts that are running;
3. drafts for the decodes to verify, as far as budgets and free pages go;
4. new sequences, if the pages of all their tokens are free; they begin after what the prefix cache
   knows.

In a step that has decodes, prompts get at most `chunked_prefill_size` tokens: a long prompt
lengthens the steps of running streams by so much and no more. When a decode finds no page, the
sequence of the largest rank gives all of its pages back and comes again later. Progress: the
smallest rank is never preempted while another sequence holds a page, and admission has checked that
it fits alone.
"""

from __future__ import annotations

from bisect import insort

from aios_compile.runtime import block_manager, policies, preemption
from aios_compile.runtime.batch import TRASH_PAGE
from aios_compile.runtime.events import Schedule
from aios_compile.runtime.prefix_cache import Hit
from aios_compile.runtime.schedule_state import Chunk, SequenceState
from aios_compile.runtime.step_context import StepContext


def plan_step(ctx: StepContext, event: Schedule) -> None:
    """Fill the plan of the next step, and put it in flight unless there is nothing to do."""
    state, plan = ctx.state, ctx.plan
    assert state.in_flight is None, "the step before has not been committed"
    if promoted := policies.promote_starved(state, ctx.now_us):
        ctx.log("promote", tuple(s.sequence_id for s in promoted), "waited too long")
    if state.options.policy == "priority":
        preemption.make_way(ctx)
    num_given_way = len(plan.preempted)
    _decodes(ctx)
    _running_prompts(ctx)
    if event.drafts:  # after the prompts, which they would starve on a small budget
        _drafts(ctx, dict(event.drafts))
    # No newcomer while pages are short; but a younger sequence that ran alone may have given way to
    # samples that wait and hold pages, and then one of them begins.
    if len(plan.preempted) == num_given_way or not plan.chunks:
        _admissions(ctx)
    if plan.num_decodes == len(plan.chunks):
        _evict_ahead(ctx)
    if plan.chunks:
        state.in_flight = plan
        state.step += 1


# ---- the parts of a step


def _decodes(ctx: StepContext) -> None:
    plan, pool, page_size = ctx.plan, ctx.state.pool, ctx.state.limits.page_size
    chunks, ids, counts = plan.chunks, [], pool.reference_counts
    indexed = () if pool.cache is None else pool.cache.by_page
    make, num_rows = tuple.__new__, 0
    for sequence in policies.in_order(ctx.state, ctx.state.running):
        start = sequence.num_computed
        if sequence.num_tokens - start != 1 or not sequence.running:
            continue  # a prompt, or preempted just now
        index, pages = start // page_size, sequence.pages
        page = pages[index] if index < len(pages) else TRASH_PAGE
        is_own = counts[page] == 1 and page not in indexed  # nobody holds the trash page
        if not is_own and not _make_room(ctx, sequence):
            continue
        rows = sequence.num_rows(start, start + 1) if sequence.all_rows else int(sequence.samples)
        # as Chunk(...) does, in half the time: this runs for every sequence in every step
        chunks.append(make(Chunk, (sequence.sequence_id, start, 1, rows, 0)))
        num_rows += rows
        ids.append(sequence.sequence_id)
    plan.num_rows += num_rows
    plan.num_tokens += len(ids)
    plan.num_decodes = len(ids)
    if ids:
        ctx.log("decode", tuple(ids), "running")


def _evict_ahead(ctx: StepContext) -> None:
    """Free the pages that these decodes begin with their next token, if there are only cached ones.

    They are evicted a step early, so that the next step may write them before it is decided
    (look_ahead.py): a step that is dropped must not have written what the cache still promises. An
    engine that has run for a while has no other pages, and of 16 sequences nearly two thirds of all
    steps begin one.
    """
    pool, size, sequences = ctx.state.pool, ctx.state.limits.page_size, ctx.state.sequences
    if len(pool.free) >= ctx.plan.num_decodes:
        return
    chunks = ctx.plan.chunks
    need = sum((c.start + 1) // size >= len(sequences[c.sequence_id].pages) for c in chunks)
    while len(pool.free) < need and pool.cached:
        block_manager.evict(ctx, "a page is needed next")


def _drafts(ctx: StepContext, wanted: dict[int, int]) -> None:
    """Lengthen decodes by drafts. They only use what is left over: free pages, tokens and rows."""
    state, plan, limits = ctx.state, ctx.plan, ctx.state.limits
    place = {chunk.sequence_id: i for i, chunk in enumerate(plan.chunks[: plan.num_decodes])}
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
    prompts = [s for s in ctx.state.running if s.num_tokens - s.num_computed > 1]
    for sequence in policies.in_order(ctx.state, prompts):
        _add_prompt_chunk(ctx, sequence)


def _admissions(ctx: StepContext) -> None:
    state, pool = ctx.state, ctx.state.pool
    for sequence in policies.candidates(state):
        if not _fits_batch(ctx, sequence):
            break
        hit = block_manager.find_hit(state, sequence)
        if block_manager.is_being_computed(state, sequence, hit):
            ctx.log_wait(sequence, "its prefix is being computed")
            continue  # it holds nobody up
        need = block_manager.pages_needed(state, sequence, hit)
        if not state.running:
            preemption.drop_waiting_holders(ctx, sequence)
            hit = block_manager.find_hit(state, sequence)
            need = block_manager.pages_needed(state, sequence, hit)
            assert pool.num_free >= need, "admission let in a sequence that never fits"
        elif pool.num_free < need + len(state.running):  # each running one may need a page soon
            ctx.log_wait(sequence, "pages", need=need, free=pool.num_free)
            break
        _admit(ctx, sequence, hit)


def _admit(ctx: StepContext, sequence: SequenceState, hit: Hit) -> None:
    policies.dequeue(ctx.state, sequence)
    if block_manager.is_on_host(sequence, hit):
        preemption.restore(ctx, sequence)
    else:
        block_manager.take(ctx, sequence, hit)
    sequence.running = True
    insort(ctx.state.running, sequence, key=policies.BY_ID)
    ctx.plan.admitted.append(sequence.sequence_id)
    ctx.log("admit", (sequence.sequence_id,), "its turn has come", pages=len(sequence.pages))
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
        victim = policies.worst_holder(ctx.state)
        preemption.preempt(ctx, victim, f"sequence {sequence.sequence_id} needs a page")
        if victim is sequence:
            return False
    block_manager.own_page_of(ctx, sequence, sequence.num_computed)
    return True
