"""The prefix cache: what is found, what is never found, and that nobody sees it in the output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aios_compile.runtime.block_manager import find_hit
from aios_compile.runtime.engine import Engine
from aios_compile.runtime.events import Arrive, Commit, Schedule
from aios_compile.runtime.prefix_cache import PrefixCache
from aios_compile.runtime.schedule_state import SchedulerOptions, SchedulerState
from aios_compile.runtime.scheduler import advance
from aios_compile.sampling_params import SamplingParams
from tests.runtime.conftest import MakeEngine, checked_engine
from tests.runtime.fake_executor import FakeExecutor, greedy, limits, logits_after
from tests.runtime.test_engine import random_requests, summary
from tests.runtime.world import World

SHARED = [int(x) for x in np.random.default_rng(0).integers(0, 50, 40)]


def cached_tokens(engine: Engine, prompt: list[int], **fields: Any) -> int:
    """Run a prompt and return how many of its tokens the cache had; the answer must be right."""
    fields = {"temperature": 0, "max_tokens": 4, **fields}
    output = engine.generate([prompt], **fields)[0]
    count = fields["max_tokens"]
    assert output.outputs[0].token_ids == greedy(prompt, count)
    return output.metrics.num_cached_tokens


@pytest.mark.parametrize("length", range(1, 41))
def test_a_repeated_prompt_computes_its_last_token_only(length: int) -> None:
    engine = checked_engine()
    try:
        assert cached_tokens(engine, SHARED[:length]) == 0
        before = engine.stats.num_tokens
        assert cached_tokens(engine, SHARED[:length]) == length - 1
        assert engine.stats.num_tokens - before == 4, "one of the prompt, three of the output"
    finally:
        engine.close()


@pytest.mark.parametrize("common", range(30))
def test_any_shared_prefix_is_found_to_the_token(common: int, make_engine: MakeEngine) -> None:
    """Pages of 4 tokens: whole pages are shared, the rest is copied."""
    engine = make_engine()
    cached_tokens(engine, SHARED[:30])
    other = [*SHARED[:common], (SHARED[common] + 1) % 50, 7, 8, 9]
    assert cached_tokens(engine, other) == common
    assert cached_tokens(engine, SHARED[:30]) == 29, "the copy changed the original"


def test_the_next_turn_of_a_conversation_reuses_the_answer(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt, known = SHARED[:11], 0
    for _ in range(4):
        assert cached_tokens(engine, prompt, max_tokens=5) == known
        # the last token of an answer was sampled and never computed
        known = len(prompt) + 4
        prompt = [*prompt, *greedy(prompt, 5), 3, 1, 4]


@pytest.mark.parametrize("batched", [8, 32, 64])
def test_running_requests_share_a_prefix(batched: int, make_engine: MakeEngine) -> None:
    """In one step, too: a request waits for the prefix that another one computes right now."""
    engine = make_engine(max_num_batched_tokens=batched)
    prompts = [[*SHARED[:24], i, i + 1] for i in range(12)]
    outputs = engine.generate(prompts, temperature=0, max_tokens=6)
    assert [o.outputs[0].token_ids for o in outputs] == [greedy(p, 6) for p in prompts]
    found = [o.metrics.num_cached_tokens for o in outputs]
    assert found[0] == 0 and all(n >= 24 for n in found[1:])
    assert engine.stats.num_cached_tokens == sum(found) >= 24 * 11


def test_tenants_never_share(make_engine: MakeEngine) -> None:
    """R7: a probe of another tenant computes as much as a cold miss."""
    engine = make_engine()
    assert cached_tokens(engine, SHARED, tenant="a") == 0
    before = engine.stats.num_tokens
    assert cached_tokens(engine, SHARED, tenant="b") == 0
    assert engine.stats.num_tokens - before == len(SHARED) + 3
    assert cached_tokens(engine, SHARED) == 0
    assert cached_tokens(engine, SHARED, tenant="a") == len(SHARED) - 1


def test_it_can_be_switched_off(make_engine: MakeEngine) -> None:
    engine = make_engine(options=SchedulerOptions(enable_prefix_caching=False))
    for _ in range(2):
        assert cached_tokens(engine, SHARED) == 0
    assert engine._core.state.pool.cache is None


def test_the_oldest_pages_are_evicted_from_their_end(make_engine: MakeEngine) -> None:
    engine = make_engine(num_pages=13)  # 12 pages of 4
    old, new = SHARED[:20], [49 - t for t in SHARED[:20]]
    cached_tokens(engine, old, max_tokens=1)
    cached_tokens(engine, new, max_tokens=1)  # 5 pages each
    third = [(t + 7) % 50 for t in SHARED[:20]]
    cached_tokens(engine, third, max_tokens=1)  # evicts 3 of the first prompt's
    assert engine.stats.num_evictions == 3
    assert cached_tokens(engine, new, max_tokens=1) == 19  # its copied page evicts one more
    assert cached_tokens(engine, old, max_tokens=1) == 4, "its first page was still there"


def test_rows_of_the_whole_prompt_are_computed(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_logit_rows=64)
    cached_tokens(engine, SHARED)
    output = engine.generate([SHARED], temperature=0, max_tokens=2, prompt_logprobs=1)[0]
    assert output.metrics.num_cached_tokens == 0 and len(output.prompt_logprobs or []) == 40
    expected = np.stack([logits_after(SHARED[: i + 1], 50) for i in range(40)])
    assert np.array_equal(engine.logits(SHARED), expected)


def test_what_a_nan_touched_is_not_cached(make_engine: MakeEngine) -> None:
    """Trap 25."""
    engine = make_engine(max_num_batched_tokens=8)
    executor = engine._core.executor
    assert isinstance(executor, FakeExecutor)

    def spoil(batch: Any, logits: Any) -> None:
        logits[:] = np.nan

    executor.after_logits = spoil
    output = engine.generate([SHARED], temperature=0, max_tokens=4)[0]
    assert output.outputs[0].finish_reason == "error"
    executor.after_logits = lambda batch, logits: None
    assert not engine._core.state.pool.cached
    assert cached_tokens(engine, SHARED) == 0


@pytest.mark.parametrize("num_pages", [9, 12, 20, 65])
@pytest.mark.parametrize("tokens", [3, 16])
def test_hits_are_invisible(num_pages: int, tokens: int) -> None:
    """Tokens, logprobs, texts of requests that share prefixes, with the cache and without."""
    requests = []
    for i, (prompt, params) in enumerate(random_requests(3, 40)):
        requests.append(([*SHARED[: 3 * (i % 5)], *prompt[:8]], params))
    results = []
    for enabled in (True, False):
        engine = checked_engine(
            options=SchedulerOptions(enable_prefix_caching=enabled),
            num_pages=num_pages if enabled else 65,
            max_num_batched_tokens=tokens if enabled else 64,
            max_num_seqs=3,
            max_num_logit_rows=3 if enabled else 64,
        )
        params = [p for _, p in requests]
        params = [_without_text(p) for p in params]
        outputs = engine.generate([prompt for prompt, _ in requests], params)
        assert (engine.stats.num_cached_tokens > 0) == enabled
        engine.close()
        results.append([summary(output) for output in outputs])
    assert results[0] == results[1]


def _without_text(params: SamplingParams) -> SamplingParams:
    values = {name: getattr(params, name) for name in ("max_tokens", "seed", "temperature", "n")}
    return SamplingParams(**values, logprobs=2, prompt_logprobs=params.prompt_logprobs)


def test_a_hash_that_always_collides_never_gives_a_wrong_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PrefixCache, "digest", lambda self, parent, tokens: b"same")
    engine = checked_engine(num_pages=20)
    try:
        for start in (0, 3, 0, 5, 3, 0):
            cached_tokens(engine, SHARED[start : start + 18])
            cached_tokens(engine, SHARED[start : start + 18], tenant="b")
    finally:
        engine.close()


def test_digests_are_keyed_chained_and_salted() -> None:
    one, other = PrefixCache(b"k" * 32, 4), PrefixCache(b"K" * 32, 4)
    digests: list[list[bytes]] = []
    for cache, tenant, tokens in (
        (one, "", [1, 2, 3, 4, 5, 6, 7, 8]),
        (other, "", [1, 2, 3, 4, 5, 6, 7, 8]),
        (one, "a", [1, 2, 3, 4, 5, 6, 7, 8]),
        (one, "", [0, 2, 3, 4, 5, 6, 7, 8]),
    ):
        digests.append([])
        cache.extend_digests(digests[-1], tenant, tokens, 2)
    assert len({d for pair in digests for d in pair}) == 8


def test_a_stale_chain_is_not_followed() -> None:
    """A page whose parent was evicted is not found below a new page of the same digest."""
    cache = PrefixCache(b"k", 2)
    tokens, digests = [1, 2, 3, 4], []
    cache.extend_digests(digests, "", tokens, 2)
    first, _ = cache.insert(1, digests[0], "", 0, (1, 2))
    cache.insert(2, digests[1], "", first, (3, 4))
    cache.drop(1)
    cache.insert(3, digests[0], "", 0, (1, 2))
    assert [e.page for e in cache.lookup("", tokens, digests, 4).entries] == [3]
    again, displaced = cache.insert(4, digests[1], "", cache.last_serial, (3, 4))
    assert displaced == 2 and again == cache.last_serial
    assert [e.page for e in cache.lookup("", tokens, digests, 4).entries] == [3, 4]
    cache.check_integrity()


def test_pages_that_were_indexed_anew_are_the_parents_of_what_comes_next() -> None:
    """A running sequence's pages left the cache and another's, equal ones, took their place."""
    world = World(limits(page_size=4), SchedulerOptions())
    prompt = [0, 1, 2, 0, 1, 2, 0, 1, 2]
    world.arrive(prompt)
    world.step(set())
    cache = world.state.pool.cache
    assert cache is not None
    first = world.state.sequences[0]
    for page in first.pages[:2]:
        cache.drop(page)
    world.arrive(prompt)
    world.step(set())
    stale = list(first.serials)
    while len(first.serials) < 3:
        world.step(set())
    assert not set(stale) & set(first.serials)
    assert len(find_hit(world.state, replace(first, pages=[])).entries) == 3
    world.drain()


@pytest.mark.parametrize(("reason", "cached"), [("length", 8), ("error", 4)])
def test_what_ended_in_an_error_is_not_cached(reason: str, cached: int) -> None:
    """Pages of 4 tokens: the first one was full, and right, before the step that failed."""
    state = SchedulerState.empty(limits(), SchedulerOptions())
    prompt = tuple(SHARED[:7])
    advance(state, Arrive(0, 0, 7, tokens=prompt), 0)
    for sampled, finished in (((3,),), ()), (((4,),), ((0, reason),)):
        advance(state, Schedule(), 0)
        advance(state, Commit(finished, sampled), 0)
    advance(state, Arrive(1, 1, 9, tokens=(*prompt, 3, 9)), 0)
    assert advance(state, Schedule(), 0).chunks[0].start == cached
