"""Bugs of schedulers, pagers and prefix caches, each planted in ours for the length of a test.

CATCHES names the test whose instrument sees the bug; the same instrument runs here for as many
steps as it needs. A bug that is not seen any more fails its test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aios_compile.runtime import block_manager, planner, policies, preemption, scheduler
from aios_compile.runtime.kv_cache import PagePool
from aios_compile.runtime.prefix_cache import PrefixCache
from tests.runtime import test_memory_of_sequences, test_policies, test_prefix_cache
from tests.runtime.test_canary import trace

Plant = Callable[[pytest.MonkeyPatch], None]
BUGS: dict[str, tuple[Plant, str]] = {}
MEMORY = "tests/runtime/test_memory_of_sequences.py"
CANARY = "tests/runtime/test_canary.py::test_random_worlds"


def bug(caught_by: str = CANARY) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        BUGS[plant.__name__] = (plant, caught_by)
        return plant

    return add


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace owner.name by around(the original, *arguments)."""
    plain = getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: around(plain, *a, **k))


def with_field(name: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a wrapper that changes a field of the sequence (second argument) afterwards."""

    def around(plain: Any, first: Any, sequence: Any, *rest: Any, **named: Any) -> Any:
        before = getattr(sequence, name)
        result = plain(first, sequence, *rest, **named)
        setattr(sequence, name, change((before, getattr(sequence, name))))
        return result

    return around


@bug()
def a_hit_across_tenants(patch: pytest.MonkeyPatch) -> None:
    """Trap 27: the cache is keyed by tokens alone."""
    wrap(patch, PrefixCache, "root_digest", lambda plain, self, tenant: plain(self, ""))
    wrap(patch, PrefixCache, "find", lambda plain, self, d, tenant, *a: (
        plain(self, d, self.entries[d].tenant if d in self.entries else tenant, *a)
    ))  # fmt: skip


@bug()
def a_hash_collision_is_believed(patch: pytest.MonkeyPatch) -> None:
    """Tokens are not compared, and the hash is short."""
    patch.setattr(PrefixCache, "digest", lambda self, parent, tokens: bytes([sum(tokens) % 5]))
    wrap(patch, PrefixCache, "find", lambda plain, self, d, *a: self.entries.get(d))


@bug()
def an_evicted_page_is_still_found(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "drop", lambda self, page: None)


@bug()
def a_partial_hit_is_one_token_too_long(patch: pytest.MonkeyPatch) -> None:
    def longer(plain: Any, self: Any, tenant: str, parent: int, tokens: Any) -> Any:
        entry, count = plain(self, tenant, parent, tokens)
        return entry, min(count + 1, len(tokens)) if entry is not None else 0

    wrap(patch, PrefixCache, "_partial", longer)


@bug()
def a_partial_hit_is_not_copied(patch: pytest.MonkeyPatch) -> None:
    def forgetting(plain: Any, ctx: Any, *rest: Any) -> None:
        count = len(ctx.plan.copies)
        plain(ctx, *rest)
        del ctx.plan.copies[count:]

    wrap(patch, block_manager, "_take_hit", forgetting)


@bug()
def a_whole_hit_leaves_no_token_to_compute(patch: pytest.MonkeyPatch) -> None:
    """vLLM's early prefix cache: a prompt that is cached to its end has no logits."""

    def whole(plain: Any, self: Any, tenant: str, tokens: Any, digests: Any, limit: int) -> Any:
        self.extend_digests(digests, tenant, tokens, len(tokens) // self.page_size)
        return plain(self, tenant, tokens, digests, limit + 1)

    wrap(patch, PrefixCache, "lookup", whole)


@bug()
def pages_that_a_nan_touched_are_cached(patch: pytest.MonkeyPatch) -> None:
    """Trap 25."""

    def keeping(plain: Any, state: Any, sequence: Any, *, keep: bool = True) -> None:
        sequence.is_finite = True
        plain(state, sequence, keep=True)

    wrap(patch, block_manager, "release", keeping)


@bug()
def a_shared_page_is_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(block_manager, "own_page_of", lambda *a: None)


@bug()
def preempted_tokens_count_as_computed(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, preemption, "release", with_field("num_computed", lambda pair: pair[0]))


@bug()
def a_page_is_released_twice(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, PagePool, "release", lambda plain, self, pages: (
        plain(self, pages), self.free.extend(pages[:1])
    ))  # fmt: skip


@bug()
def an_aborted_request_keeps_its_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(block_manager, "release", lambda *a, **k: None)


@bug()
def a_swap_restores_pages_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    def reversing(plain: Any, ctx: Any, sequence: Any) -> None:
        sequence.host_pages.reverse()
        plain(ctx, sequence)

    wrap(patch, preemption, "restore", reversing)


@bug()
def a_swap_counts_a_token_too_many(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, preemption, "restore", with_field(
        "num_computed", lambda pair: pair[1] + 1
    ))  # fmt: skip


@bug()
def host_pages_are_never_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(preemption, "forget_host_copy", lambda *a: None)


@bug()
def the_window_is_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Trap 13, and the story of every sliding-window cache."""
    wrap(patch, block_manager, "drop_left_window", lambda plain, ctx, sequence, window: (
        plain(ctx, sequence, max(1, window - 1))
    ))  # fmt: skip


@bug()
def a_fork_skips_the_last_prompt_token(patch: pytest.MonkeyPatch) -> None:
    def skipping(plain: Any, ctx: Any, leader: Any) -> None:
        numbers = list(ctx.state.siblings[leader.sequence_id])
        plain(ctx, leader)
        for number in numbers:
            ctx.state.sequences[number].num_computed = leader.num_prompt_tokens

    wrap(patch, block_manager, "fork", skipping)


@bug()
def rejected_drafts_stay_in_the_cache(patch: pytest.MonkeyPatch) -> None:
    def keeping(plain: Any, sequence: Any, chunk: Any, *rest: Any) -> None:
        plain(sequence, chunk, *rest)
        if chunk.num_drafts:
            sequence.num_computed = min(chunk.start + chunk.num_tokens, sequence.num_tokens)

    wrap(patch, scheduler, "_accept", keeping)


@bug(f"{MEMORY}::test_drafts_leave_a_prompt_its_tokens")
def drafts_starve_a_prompt(patch: pytest.MonkeyPatch) -> None:
    """Ours: drafts were planned before the prompts and took the last tokens of the budget."""
    drafts, prompts = planner._drafts, planner._running_prompts

    def first(ctx: Any) -> None:
        drafts(ctx, {s.sequence_id: 4 for s in ctx.state.running})
        prompts(ctx)

    patch.setattr(planner, "_running_prompts", first)
    patch.setattr(planner, "_drafts", lambda *a: None)


@bug()
def chunks_exceed_the_budget(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, planner, "_chunk_size", lambda plain, ctx, sequence: plain(ctx, sequence) + 1)


@bug()
def the_oldest_is_preempted(patch: pytest.MonkeyPatch) -> None:
    """Trap 20: a shortage takes the pages of whom it should protect."""

    def oldest(state: Any) -> Any:
        holders = [*state.running, *(s for s in state.waiting if s.pages)]
        return min(holders, key=policies.rank(state))

    patch.setattr(policies, "worst_holder", oldest)


@bug()
def prompt_rows_come_twice_after_a_preemption(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, preemption, "release", with_field("num_rows_done", lambda pair: 0))


@bug()
def a_younger_one_alone_gives_way_and_nobody_runs(patch: pytest.MonkeyPatch) -> None:
    """Ours: the only running sequence preempted itself for pages that waiting samples held."""

    def plan_step(plain: Any, ctx: Any, event: Any) -> None:
        admissions = planner._admissions
        planner._admissions = lambda ctx: (  # type: ignore[assignment]
            None if ctx.plan.preempted else admissions(ctx)
        )
        try:
            plain(ctx, event)
        finally:
            planner._admissions = admissions

    wrap(patch, scheduler, "plan_step", plan_step)


@bug()
def samples_share_what_a_nan_touched(patch: pytest.MonkeyPatch) -> None:
    """Ours: a leader that failed gave its prompt's pages to its samples first."""
    plain = scheduler._commit_chunk

    def sharing(ctx: Any, sequence: Any, chunk: Any, sampled: Any, finished: Any) -> None:
        plain(ctx, sequence, chunk, sampled, finished)
        done = sequence.num_computed >= sequence.num_prompt_tokens
        if done and chunk.sequence_id in ctx.state.siblings:
            block_manager.fork(ctx, sequence)

    patch.setattr(scheduler, "_commit_chunk", sharing)


@bug("tests/runtime/test_policies.py::test_nobody_starves")
def priorities_starve_the_others(patch: pytest.MonkeyPatch) -> None:
    """vllm#41951."""
    patch.setattr(policies, "promote_starved", lambda *a: [])


@bug("tests/runtime/test_policies.py::test_a_long_prompt_never_stalls_a_running_stream")
def a_long_prompt_stalls_the_streams(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, test_policies, "SchedulerOptions", lambda plain, **k: plain(
        **{**k, "chunked_prefill_size": None}
    ))  # fmt: skip


@bug(f"{MEMORY}::test_what_costs_less_is_chosen")
def a_swap_is_counted_one_way(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, preemption, "_swap_costs_less", lambda plain, ctx, sequence: (
        len(sequence.pages) * ctx.state.costs.page_copy_us
        < sequence.num_computed * ctx.state.costs.token_us
    ))  # fmt: skip


@bug("tests/runtime/test_prefix_cache.py::test_tenants_never_share")
def a_probe_of_another_tenant_is_faster(patch: pytest.MonkeyPatch) -> None:
    a_hit_across_tenants(patch)


def instrument(caught_by: str, make_engine: Any) -> None:
    """Run the test that is named, with its own arguments."""
    name = caught_by.rpartition("::")[2]
    if caught_by == CANARY:
        for seed in range(2):
            trace(seed, 3000)
    elif name == "test_nobody_starves":
        test_policies.test_nobody_starves("priority")
    elif name == "test_a_long_prompt_never_stalls_a_running_stream":
        test_policies.test_a_long_prompt_never_stalls_a_running_stream("fcfs")
    elif name == "test_drafts_leave_a_prompt_its_tokens":
        test_memory_of_sequences.test_drafts_leave_a_prompt_its_tokens()
    elif name == "test_what_costs_less_is_chosen":
        test_memory_of_sequences.test_what_costs_less_is_chosen()
    else:
        test_prefix_cache.test_tenants_never_share(make_engine)


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_seen(name: str, monkeypatch: pytest.MonkeyPatch, make_engine: Any) -> None:
    plant, caught_by = BUGS[name]
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        instrument(caught_by, make_engine)


@pytest.mark.parametrize("caught_by", sorted({test for _, test in BUGS.values()}))
def test_nothing_is_seen_without_a_bug(caught_by: str, make_engine: Any) -> None:
    instrument(caught_by, make_engine)


def test_the_museum_has_enough_rooms() -> None:
    assert len(BUGS) >= 20
