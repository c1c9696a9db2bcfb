"""Swap to host memory, pages that leave the window, deadlines, memory pressure, drafts."""

from __future__ import annotations

import time
from typing import Any

import pytest

from aios_compile.errors import ConfigError
from aios_compile.runtime.events import (
    Arrive,
    Calibrate,
    Commit,
    Expire,
    MemoryPressure,
    Preempt,
    Schedule,
)
from aios_compile.runtime.page_moves import TokenCost
from aios_compile.runtime.schedule_state import Costs, Plan, SchedulerOptions, SchedulerState
from aios_compile.runtime.scheduler import advance
from tests.runtime.conftest import MakeEngine, checked_engine
from tests.runtime.fake_executor import FakeExecutor, FakeTokenizer, greedy, limits
from tests.runtime.fake_gpu import FakeGpu
from tests.runtime.test_engine import random_requests, run_alone, summary
from tests.runtime.test_overhead import NullExecutor

SWAP = SchedulerOptions(num_host_pages=40, enable_prefix_caching=False)


@pytest.mark.parametrize(
    ("kind", "how", "cache"),
    [
        (FakeExecutor, "swap", True), (FakeExecutor, "swap", False),
        (FakeExecutor, "recompute", True), (FakeExecutor, "recompute", False),
        (FakeGpu, "swap", False), (FakeGpu, "recompute", True),
    ],
)  # fmt: skip
def test_preemption_at_every_step_is_invisible(kind: Any, how: str, cache: bool) -> None:
    """R4: tokens, logprobs, text, reasons and usage, whatever step takes the pages, and how."""
    requests = random_requests(2, 5)
    expected = run_alone(requests)
    num_steps, step, num_moves = 1, 0, 0
    while step < num_steps:
        options = SchedulerOptions(num_host_pages=40, enable_prefix_caching=cache)
        engine = checked_engine(FakeTokenizer(), options=options, executor=kind(limits()))
        core, plain = engine._core, engine._core.step

        def preempting(core: Any = core, plain: Any = plain, step: int = step) -> None:
            nonlocal num_moves
            if core.stats.num_steps == step:
                for sequence in list(core.state.running):
                    num_moves += len(core._advance(Preempt(sequence.sequence_id, how)).swap_outs)
            plain()

        core.step = preempting  # type: ignore[method-assign]
        outputs = engine.generate([p for p, _ in requests], [params for _, params in requests])
        num_steps = engine.stats.num_steps
        engine.close()
        assert [summary(output) for output in outputs] == expected, f"preempted at step {step}"
        step += 1
    assert num_steps > 8 and (num_moves > 10) == (how == "swap")


def test_a_swapped_sequence_computes_nothing_again() -> None:
    tokens = {}
    for how in ("swap", "recompute"):
        engine = checked_engine(options=SWAP)
        core, plain = engine._core, engine._core.step

        def preempting(core: Any = core, plain: Any = plain, how: str = how) -> None:
            if core.stats.num_steps in (3, 7):
                core._advance(Preempt(core.state.running[0].sequence_id, how))
            plain()

        core.step = preempting  # type: ignore[method-assign]
        output = engine.generate([[5] * 13], temperature=0, max_tokens=10)[0]
        assert output.outputs[0].token_ids == greedy([5] * 13, 10)
        assert output.metrics.num_preemptions == 2 and output.metrics.num_cached_tokens == 0
        tokens[how] = engine.stats.num_tokens
        engine.close()
    assert tokens == {"swap": 13 + 9, "recompute": 13 + 9 + (13 + 2) + (13 + 6)}


def shortage(token_us: float, page_copy_us: float) -> Plan:
    """Return the plan in which a decode takes the pages of the sequence that came last."""
    state = SchedulerState.empty(limits(num_pages=5), SWAP)
    for event in (Arrive(0, 0, 7), Arrive(1, 1, 4), Calibrate(token_us, page_copy_us)):
        advance(state, event, 0)
    for _ in range(2):
        advance(state, Schedule(), 0)
        advance(state, Commit(), 0)
    plan = advance(state, Schedule(), 0)
    state.check_integrity()
    return plan


def test_what_costs_less_is_chosen() -> None:
    """Sequence 1 has 5 tokens in 2 pages; swapping copies each out and in."""
    assert shortage(10.0, 12.4).swap_outs and shortage(10.0, 12.4).preempted == [1]
    assert not shortage(10.0, 12.6).swap_outs and shortage(10.0, 12.6).preempted == [1]
    unmeasured = Costs()
    plan = shortage(unmeasured.token_us, unmeasured.page_copy_us)
    assert not plan.swap_outs and plan.preempted == [1], "nothing was measured yet"


def test_a_sequence_of_one_page_is_swapped_as_well() -> None:
    state = SchedulerState.empty(limits(), SWAP)
    advance(state, Arrive(0, 0, 3), 0)
    advance(state, Schedule(), 0)
    advance(state, Commit(), 0)
    assert len(state.sequences[0].pages) == 1
    assert len(advance(state, Preempt(0, "swap"), 0).swap_outs) == 1


def test_a_full_host_pool_means_recompute() -> None:
    engine = checked_engine(
        options=SchedulerOptions(num_host_pages=2, enable_prefix_caching=False), num_pages=10
    )
    engine._core._advance(Calibrate(1000.0, 0.001))
    outputs = engine.generate([[i] * 9 for i in range(6)], temperature=0, max_tokens=14)
    stats, kinds = engine.stats, [d.kind for d in engine.log.ring]
    engine.close()
    assert [o.outputs[0].token_ids for o in outputs] == [greedy([i] * 9, 14) for i in range(6)]
    assert stats.num_preemptions > 3 and "preempt" in kinds


def test_swap_needs_an_executor_that_can() -> None:
    with pytest.raises(ConfigError, match="no host memory to swap to"):
        checked_engine(executor=NullExecutor(), options=SWAP)


def test_the_cost_of_a_token_is_the_slope_between_kinds_of_steps() -> None:
    cost = TokenCost(page_copy_us=5.0)
    events = []
    for i in range(64):
        tokens = 100 if i % 2 else 4
        plan = Plan(num_tokens=tokens, num_prefill_tokens=tokens - 4)
        events.append(cost.observe(plan, 1000.0 + 20.0 * tokens))
    found = [event for event in events if event is not None]
    assert [round(e.token_us, 6) for e in found] == [20.0] and found[0].page_copy_us == 5.0
    assert TokenCost(0.0).observe(Plan(num_tokens=1), 1.0) is None


# ---- windows


@pytest.mark.parametrize("window", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("how", [None, "swap", "recompute"])
def test_pages_that_left_the_window_are_free(window: int, how: str | None) -> None:
    """The fake model sees its window only, and freed pages are poisoned."""
    options = SchedulerOptions(window_tokens=window, num_host_pages=30)
    executor = FakeExecutor(limits(max_num_batched_tokens=6), window)
    engine = checked_engine(executor=executor, options=options)
    core, plain = engine._core, engine._core.step
    most = 0

    def watching() -> None:
        nonlocal most
        if how is not None and core.stats.num_steps % 5 == 4 and core.state.running:
            core._advance(Preempt(core.state.running[0].sequence_id, how))
        plain()
        for s in core.state.running:
            kept = [page for page in s.pages if page]
            if s.num_tokens - s.num_computed == 1:
                most = max(most, len(kept))

    core.step = watching  # type: ignore[method-assign]
    prompts = [[i, *range(12), i] for i in range(5)] * 2
    outputs = engine.generate(prompts, temperature=0, max_tokens=20, n=2)
    engine.close()
    for prompt, output in zip(prompts, outputs):
        expected = greedy(prompt, 20, window=window)
        assert [o.token_ids for o in output.outputs] == [expected] * 2
    assert most <= (window - 1) // 4 + 2, "window + 1 tokens lie in at most so many pages of 4"


def test_a_page_is_kept_to_the_last_query_that_sees_it() -> None:
    state = SchedulerState.empty(limits(), SchedulerOptions(window_tokens=5))
    advance(state, Arrive(0, 0, 7), 0)
    for _ in range(3):
        advance(state, Schedule(), 0)
        advance(state, Commit(), 0)
        sequence = state.sequences[0]
        # the next query p = num_computed sees the keys from p - 4 on
        assert (sequence.pages[0] == 0) == (sequence.num_computed - 4 >= 4)
    assert sequence.num_computed == 9 and sequence.num_dropped == 1


# ---- deadlines and pressure


def test_a_request_ends_at_its_deadline(make_engine: MakeEngine) -> None:
    engine = make_engine()
    executor = engine._core.executor
    assert isinstance(executor, FakeExecutor)
    executor.step_seconds = 0.01
    start = time.monotonic()
    late, other = engine.generate(
        [[1, 2, 3], [4, 5]],
        [
            engine.defaults.params(max_tokens=60, temperature=0, timeout_s=0.1),
            engine.defaults.params(max_tokens=30, temperature=0),
        ],
    )
    assert time.monotonic() - start < 5
    output = late.outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("abort", "timeout")
    assert 0 < len(output.token_ids) < 60
    assert output.token_ids == greedy([1, 2, 3], len(output.token_ids))
    assert other.outputs[0].token_ids == greedy([4, 5], 30)


def test_expire_drops_those_whose_time_is_over() -> None:
    state = SchedulerState.empty(limits())
    advance(state, Arrive(7, 0, 5, 2, deadline_us=100), 0)
    advance(state, Arrive(8, 2, 5, deadline_us=101), 0)
    advance(state, Arrive(9, 3, 5), 0)
    assert advance(state, Expire(), 99).expired == []
    assert advance(state, Expire(), 100).expired == [7]
    assert sorted(state.sequences) == [2, 3]
    state.check_integrity()


def test_memory_pressure_takes_cached_pages_then_running_ones() -> None:
    state = SchedulerState.empty(limits(num_pages=13, max_pages_per_sequence=6))
    advance(state, Arrive(0, 0, 9, tokens=tuple(range(9))), 0)
    advance(state, Arrive(1, 1, 9, tokens=tuple(range(9, 18))), 0)
    advance(state, Schedule(), 0)
    advance(state, Commit((), ((1,), ())), 0)
    advance(state, Schedule(), 0)
    advance(state, Commit(((0, "stop"),), ((2,), (3,))), 0)
    assert len(state.pool.cached) == 3 and len(state.pool.free) == 6
    plan = advance(state, MemoryPressure(8), 0)
    state.check_integrity()
    assert len(plan.withheld) == 6 and not plan.preempted, "one sequence's 6 pages always stay"
    assert advance(state, MemoryPressure(2), 0).returned == plan.withheld[:1:-1]
    advance(state, MemoryPressure(0), 0)
    assert not state.pool.withheld
    state.check_integrity()


def test_answers_are_the_same_under_pressure(make_engine: MakeEngine) -> None:
    engine = make_engine(num_pages=30, max_pages_per_sequence=8)
    core, plain = engine._core, engine._core.step

    def pressing() -> None:
        core._advance(MemoryPressure((core.stats.num_steps * 7) % 25))
        plain()
        if not core.state.has_work:
            core._advance(MemoryPressure(0))

    core.step = pressing  # type: ignore[method-assign]
    prompts = [[i, 2, *range(i)] for i in range(14)]
    outputs = engine.generate(prompts, temperature=0, max_tokens=12)
    assert [o.outputs[0].token_ids for o in outputs] == [greedy(p, 12) for p in prompts]
    assert engine.stats.num_preemptions > 3
    core.step = plain  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="num_pages=-1"):
        engine.hold_back(-1)
    engine.hold_back(5)
    engine.generate([[1]], max_tokens=2)
    assert len(core.state.pool.withheld) == 5
    engine.hold_back(0)
    engine.generate([[1]], max_tokens=2)


# ---- drafts


def test_drafts_use_what_is_left_and_roll_back() -> None:
    state = SchedulerState.empty(limits(max_num_batched_tokens=8, num_pages=9))
    for i in range(2):
        advance(state, Arrive(i, i, 3, tokens=(i, 1, 2)), 0)
    advance(state, Schedule(), 0)
    advance(state, Commit((), ((5,), (6,))), 0)
    plan = advance(state, Schedule(drafts=((1, 4), (0, 9))), 0)
    state.check_integrity()
    assert [tuple(c) for c in plan.chunks] == [(0, 3, 3, 3, 2), (1, 3, 5, 5, 4)]
    assert plan.num_tokens == plan.num_rows == 8
    advance(state, Commit((), ((7, 8, 9), (4,))), 0)  # two drafts accepted; none
    state.check_integrity()
    zero, one = state.sequences[0], state.sequences[1]
    assert (zero.num_computed, zero.num_tokens, zero.tokens) == (6, 7, [0, 1, 2, 5, 7, 8, 9])
    assert (one.num_computed, one.num_tokens) == (4, 5)
    assert len(zero.serials) == 1, "positions 0..3 are certain, 4..5 fill no page"
    advance(state, Schedule(), 0)
    advance(state, Commit(((0, "stop"), (1, "stop")), ((1,), (1,))), 0)
    state.check_integrity()


def test_drafts_leave_a_prompt_its_tokens() -> None:
    """Found by a random world: drafts took the last tokens of a small budget, step after step."""
    state = SchedulerState.empty(
        limits(max_num_batched_tokens=3), SchedulerOptions(chunked_prefill_size=1)
    )
    advance(state, Arrive(0, 0, 2), 0)
    advance(state, Schedule(), 0)
    advance(state, Commit(), 0)
    advance(state, Arrive(1, 1, 9), 0)
    for start in range(4):
        plan = advance(state, Schedule(drafts=((0, 4),) if start else ()), 0)
        assert plan.chunks[1][:3] == (1, start, 1)
        assert plan.chunks[0].num_drafts == min(start, 1), "and they get what it leaves"
        advance(state, Commit(), 0)


def test_drafts_never_preempt() -> None:
    state = SchedulerState.empty(limits(num_pages=4))  # 3 pages of 4
    for i in range(2):
        advance(state, Arrive(i, i, 3), 0)
    advance(state, Schedule(), 0)
    advance(state, Commit(), 0)
    plan = advance(state, Schedule(drafts=((0, 5), (1, 5))), 0)
    assert not plan.preempted and [c.num_drafts for c in plan.chunks] == [0, 0]
