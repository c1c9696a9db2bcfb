"""Pages for sequences: taken, shared, copied before a write, cached, and given back.

Functions of a StepContext; they change its state's pool and put page copies into its plan. What a
shortage does (who is preempted) is decided in scheduler.py and preemption.py.
"""

from __future__ import annotations

from aios_compile.runtime.batch import TRASH_PAGE
from aios_compile.runtime.prefix_cache import ROOT, Hit
from aios_compile.runtime.schedule_state import SchedulerState, SequenceState
from aios_compile.runtime.step_context import StepContext

NO_HIT = Hit([], None, 0)


def allocate(ctx: StepContext) -> int:
    """Take a page, the oldest cached one if no other is free; `num_free` says that there is one."""
    pool = ctx.state.pool
    if not pool.free:
        evict(ctx, "a page is needed")
    return pool.allocate()


def evict(ctx: StepContext, reason: str) -> None:
    """Drop the cached page that was not used for longest."""
    page = ctx.state.pool.evict()
    ctx.plan.num_evictions += 1
    ctx.log("evict", (), reason, page=page)


def find_hit(state: SchedulerState, sequence: SequenceState) -> Hit:
    """Return the cached prefix that a sequence without pages can start from.

    Its last token is always computed: its logits are needed. A request for the rows of its whole
    prompt computes all of it.
    """
    cache = state.pool.cache
    if cache is None or sequence.tokens is None or sequence.all_rows or sequence.pages:
        return NO_HIT
    limit = sequence.num_tokens - 1
    num_pages = limit // cache.page_size
    if len(sequence.digests) < num_pages:
        cache.extend_digests(sequence.digests, sequence.tenant, sequence.tokens, num_pages)
    return cache.lookup(sequence.tenant, sequence.tokens, sequence.digests, limit)


def is_being_computed(state: SchedulerState, sequence: SequenceState, hit: Hit) -> bool:
    """Return whether a running prompt computes the page that would come after the hit.

    It is worth waiting for: the page can be shared as soon as that prompt has sampled a token.
    """
    index = len(hit.entries)
    if state.pool.cache is None or sequence.pages or index >= len(sequence.digests):
        return False
    if sequence.tokens is None or sequence.all_rows or sequence.num_swapped:
        return False
    digest = sequence.digests[index]
    return any(
        not other.is_finite and other.digests[index : index + 1] == [digest]
        for other in state.running
    )


def pages_needed(state: SchedulerState, sequence: SequenceState, hit: Hit) -> int:
    """Return the pages, free or cached, that all known tokens need beyond those already held.

    Counts the copy of a shared page, and cached pages that the hit takes out of the pool.
    """
    pool, page_size = state.pool, state.limits.page_size
    total = -(-sequence.num_tokens // page_size)
    if is_on_host(sequence, hit):
        return total - sequence.num_swapped_dropped
    if hit.entries:
        held = sum(pool.reference_counts[entry.page] > 0 for entry in hit.entries)
        return total - held
    index = sequence.num_computed // page_size
    shared = index < len(sequence.pages) and pool.is_shared(sequence.pages[index])
    return total - len(sequence.pages) + shared


def is_on_host(sequence: SequenceState, hit: Hit) -> bool:
    """Return whether a sequence comes back from host memory: it has more there than the hit."""
    known = sum(len(entry.tokens) for entry in hit.entries) + hit.num_partial
    return sequence.num_swapped > known


def forget_host_copy(state: SchedulerState, sequence: SequenceState) -> None:
    """Free the host pages of a sequence, if it has any."""
    if state.host is not None:
        state.host.release(sequence.host_pages)
    sequence.host_pages = []
    sequence.num_swapped = sequence.num_swapped_dropped = 0


def take(ctx: StepContext, sequence: SequenceState, hit: Hit) -> None:
    """Give a sequence the pages of all its known tokens, those of the hit first."""
    forget_host_copy(ctx.state, sequence)
    if hit.entries or hit.source is not None:
        _take_hit(ctx, sequence, hit)
    else:
        own_page_of(ctx, sequence, sequence.num_computed)
    total = -(-sequence.num_tokens // ctx.state.limits.page_size)
    for _ in range(total - len(sequence.pages)):
        sequence.pages.append(allocate(ctx))


def _take_hit(ctx: StepContext, sequence: SequenceState, hit: Hit) -> None:
    pool, page_size = ctx.state.pool, ctx.state.limits.page_size
    pages = [entry.page for entry in hit.entries]
    pool.share(pages)
    sequence.pages = pages
    sequence.page_epoch += 1
    sequence.serials = [entry.serial for entry in hit.entries]
    sequence.num_computed = len(pages) * page_size + hit.num_partial
    if hit.source is not None:
        source = hit.source.page
        pool.touch(source)
        target = allocate(ctx)  # may evict the source itself: it is copied before it is written
        sequence.pages.append(target)
        if target != source:
            ctx.plan.copies.append((source, target))
    ctx.plan.hits.append((sequence.sequence_id, sequence.num_computed))
    ctx.log(
        "hit",
        (sequence.sequence_id,),
        "tokens found in the prefix cache",
        tokens=sequence.num_computed,
        pages=len(pages),
        copied=hit.num_partial,
    )


def own_page_of(ctx: StepContext, sequence: SequenceState, position: int) -> None:
    """Copy the page of a position before it is written, if others read it too."""
    pool, index = ctx.state.pool, position // ctx.state.limits.page_size
    if index >= len(sequence.pages):
        return
    source = sequence.pages[index]
    if not pool.is_shared(source):
        if pool.is_indexed(source):  # a sample's leader has left it; no promise about it any more
            assert pool.cache is not None
            pool.cache.drop(source)
        return
    target = allocate(ctx)
    pool.release([source])
    sequence.pages[index] = target
    sequence.page_epoch += 1
    ctx.plan.copies.append((source, target))
    reason = "written while shared"
    ctx.log("copy", (sequence.sequence_id,), reason, source=source, target=target)


def fork(ctx: StepContext, leader: SequenceState) -> None:
    """Give the leader's prompt pages to its siblings, which compute only the last token again.

    They sample from their own row then, on the same path as every decode.
    """
    state, page_size = ctx.state, ctx.state.limits.page_size
    shared_tokens = leader.num_prompt_tokens - 1
    pages = leader.pages[: -(-shared_tokens // page_size)]
    siblings = state.siblings.pop(leader.sequence_id)
    for sibling in (state.sequences[i] for i in siblings):
        state.pool.share(pages)
        sibling.pages = list(pages)
        sibling.page_epoch += 1
        sibling.num_dropped = min(leader.num_dropped, len(pages))
        sibling.num_computed = shared_tokens
        sibling.serials = leader.serials[: shared_tokens // page_size]
        sibling.digests = list(leader.digests)
        sibling.is_finite = leader.is_finite
        sibling.forks_from = None
    ctx.log("fork", tuple(siblings), "the shared prompt is computed", pages=len(pages))


def publish(state: SchedulerState, sequence: SequenceState, num_pages: int) -> None:
    """Let the prefix cache know the first num_pages pages, which are full and computed.

    Only after a row of the sequence was finite: what a NaN has touched is never cached.
    """
    pool, size = state.pool, state.limits.page_size
    cache, tokens, serials = pool.cache, sequence.tokens, sequence.serials
    if cache is None or tokens is None:
        return
    if len(sequence.digests) < num_pages:
        cache.extend_digests(sequence.digests, sequence.tenant, tokens, num_pages)
    if serials and not _is_alive(state, sequence, len(serials) - 1):
        serials.clear()  # evicted meanwhile; our own pages hold the same
    for i in range(len(serials), num_pages):
        parent = serials[-1] if serials else ROOT
        own = tuple(tokens[i * size : (i + 1) * size])
        digest, page = sequence.digests[i], sequence.pages[i]
        entry = cache.find(digest, sequence.tenant, parent, own)
        if entry is not None:
            serials.append(entry.serial)
        elif page == TRASH_PAGE:
            return  # it left the window and was evicted: the chain cannot be mended
        else:
            if page in cache.by_page:
                cache.drop(page)  # indexed below a parent that is gone
            serials.append(pool.index(page, digest, sequence.tenant, parent, own))


def _is_alive(state: SchedulerState, sequence: SequenceState, index: int) -> bool:
    assert state.pool.cache is not None
    entry = state.pool.cache.entries.get(sequence.digests[index])
    return entry is not None and entry.serial == sequence.serials[index]


def _publish_rest(state: SchedulerState, sequence: SequenceState) -> None:
    """Index the last page, which is not full, for copies of its first tokens."""
    pool, size = state.pool, state.limits.page_size
    cache, tokens = pool.cache, sequence.tokens
    num_full, rest = divmod(sequence.num_computed, size)
    if cache is None or tokens is None or not rest or len(sequence.serials) != num_full:
        return
    page = sequence.pages[num_full]
    if page == TRASH_PAGE or pool.is_shared(page) or pool.is_indexed(page):
        return
    if num_full and not _is_alive(state, sequence, num_full - 1):
        return
    own = tuple(tokens[num_full * size : sequence.num_computed])
    above = sequence.digests[num_full - 1] if num_full else cache.root_digest(sequence.tenant)
    parent = sequence.serials[-1] if num_full else ROOT
    pool.index(page, cache.digest(above, own), sequence.tenant, parent, own)


def release(state: SchedulerState, sequence: SequenceState, *, keep: bool = True) -> None:
    """Take all pages of a sequence back; keep: what is computed and finite stays cached."""
    if keep and sequence.is_finite and sequence.pages:
        publish(state, sequence, sequence.num_computed // state.limits.page_size)
        _publish_rest(state, sequence)
    state.pool.release(sequence.pages)
    sequence.pages = []
    sequence.serials = []
    sequence.num_dropped = 0
    sequence.page_epoch += 1
    sequence.num_computed = 0


def drop_left_window(ctx: StepContext, sequence: SequenceState, window: int) -> None:
    """Give back pages that no later query sees: query p sees the keys after p - window."""
    first_seen = sequence.num_computed - window + 1
    first_kept = min(first_seen // ctx.state.limits.page_size, len(sequence.pages))
    if first_kept <= sequence.num_dropped:
        return
    left = slice(sequence.num_dropped, first_kept)
    ctx.state.pool.release(sequence.pages[left])
    sequence.pages[left] = [TRASH_PAGE] * (first_kept - sequence.num_dropped)
    ctx.log("window", (sequence.sequence_id,), "left the window", pages=first_kept - left.start)
    sequence.num_dropped = first_kept
    sequence.page_epoch += 1
