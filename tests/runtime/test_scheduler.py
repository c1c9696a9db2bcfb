"""The scheduler's policy, case by case: what runs, what waits, what is preempted and copied."""

from __future__ import annotations

import json

from aios_compile.runtime.decisions import KINDS
from aios_compile.runtime.events import (
    Abort,
    Arrive,
    Commit,
    Event,
    Preempt,
    Schedule,
    event_from_record,
    event_record,
)
from aios_compile.runtime.schedule_state import Plan, SchedulerState
from aios_compile.runtime.scheduler import advance, transition
from tests.runtime.fake_executor import limits


class Driver:
    """A state with short verbs; every event is followed by the integrity check."""

    def __init__(self, **changes: object) -> None:
        self.state = SchedulerState.empty(limits(**changes))
        self.kinds: list[str] = []

    def do(self, event: Event) -> Plan:
        plan = advance(self.state, event, 0)
        self.state.check_integrity()
        self.kinds += [decision.kind for decision in plan.decisions]
        assert set(self.kinds) <= set(KINDS)
        return plan

    def arrive(self, first: int, prompt: int, n: int = 1, **options: bool) -> None:
        self.do(Arrive(first, first, prompt, n, **options))

    def step(self, *finished: int) -> Plan:
        plan = self.do(Schedule())
        self.do(Commit(tuple((i, "stop") for i in finished)))
        return plan


def shape(plan: Plan) -> list[tuple[int, int, int]]:
    return [(c.sequence_id, c.start, c.num_tokens) for c in plan.chunks]


def test_chunked_prefill_under_the_token_budget() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.arrive(0, 19)
    driver.arrive(1, 3)
    plans = [shape(driver.step()) for _ in range(4)]
    assert plans[0] == [(0, 0, 8)] and plans[1] == [(0, 8, 8)]
    assert plans[2] == [(0, 16, 3), (1, 0, 3)]
    assert plans[3] == [(0, 19, 1), (1, 3, 1)]


def test_decodes_come_first() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.arrive(0, 2)
    driver.step()
    driver.arrive(1, 20)
    assert shape(driver.step()) == [(0, 2, 1), (1, 0, 7)]
    assert shape(driver.step()) == [(0, 3, 1), (1, 7, 7)]


def test_rows_cut_the_chunks_of_requests_that_want_all_rows() -> None:
    driver = Driver(max_num_logit_rows=4)
    driver.arrive(0, 10, all_rows=True)
    plans = [driver.step() for _ in range(3)]
    assert [shape(p) for p in plans] == [[(0, 0, 4)], [(0, 4, 4)], [(0, 8, 2)]]
    assert [p.num_rows for p in plans] == [4, 4, 2]


def test_at_most_max_num_seqs_run_and_the_queue_is_first_come_first_served() -> None:
    driver = Driver(max_num_seqs=2)
    for i in range(4):
        driver.arrive(i, 2)
    assert [s for s, _, _ in shape(driver.step())] == [0, 1]
    assert [s for s, _, _ in shape(driver.step(0))] == [0, 1]
    assert [s for s, _, _ in shape(driver.step())] == [1, 2]
    assert "wait" in driver.kinds


def test_the_latest_is_preempted_and_comes_back_first() -> None:
    driver = Driver(num_pages=5)  # 4 pages of 4 tokens
    driver.arrive(0, 7)
    driver.arrive(1, 4)
    driver.step()
    driver.step()
    plan = driver.step()
    assert shape(plan) == [(0, 8, 1)] and plan.preempted == [1]
    assert driver.state.sequences[1].num_computed == 0
    while driver.state.sequences[0].num_tokens < 13:
        assert shape(driver.step())[0][0] == 0
    driver.step(0)
    assert shape(driver.step()) == [(1, 0, 6)], "the prompt and its two tokens, again"


def test_samples_share_the_prompt_and_copy_its_last_page_when_they_write() -> None:
    driver = Driver()
    driver.arrive(0, 6, n=3)
    driver.step()
    pages = driver.state.sequences[0].pages
    assert driver.state.sequences[1].pages == driver.state.sequences[2].pages == pages
    plan = driver.step()
    assert shape(plan) == [(0, 6, 1), (1, 5, 1), (2, 5, 1)]
    assert len(plan.copies) == 2, "the last holder writes the page without a copy"
    first = {driver.state.sequences[i].pages[0] for i in range(3)}
    last = {driver.state.sequences[i].pages[1] for i in range(3)}
    assert len(first) == 1 and len(last) == 3


def test_no_copy_at_a_page_border() -> None:
    driver = Driver()
    driver.arrive(0, 5, n=2)
    driver.step()
    plan = driver.step()
    assert shape(plan) == [(0, 5, 1), (1, 4, 1)] and plan.copies == []


def test_siblings_of_a_leader_that_ends_early_compute_the_prompt_themselves() -> None:
    driver = Driver(max_num_batched_tokens=4)
    driver.arrive(0, 9, n=2)
    driver.step(0)
    assert shape(driver.step()) == [(1, 0, 4)]


def test_a_sibling_survives_the_end_of_its_leader() -> None:
    driver = Driver(max_num_seqs=1)
    driver.arrive(0, 6, n=2)
    driver.step(0)
    assert shape(driver.step(1)) == [(1, 5, 1)]
    assert driver.state.pool.num_free == driver.state.limits.num_pages - 1


def test_abort_frees_all_samples_wherever_they_are() -> None:
    driver = Driver()
    driver.arrive(0, 6, n=3)
    driver.do(Abort(0))
    driver.arrive(3, 6, n=3)
    driver.step()
    driver.step()
    driver.do(Abort(3))
    driver.do(Abort(99))
    assert not driver.state.sequences
    assert driver.state.pool.num_free == driver.state.limits.num_pages - 1


def test_a_request_for_logits_ends_without_a_token() -> None:
    driver = Driver()
    driver.arrive(0, 3, all_rows=True, samples=False)
    plan = driver.do(Schedule())
    assert plan.num_rows == 3
    driver.do(Commit(((0, "length"),)))
    assert not driver.state.has_work


def test_transition_leaves_the_state_alone() -> None:
    before = SchedulerState.empty(limits())
    after, plan = transition(before, Arrive(0, 0, 5), 7)
    assert not before.sequences and list(after.sequences) == [0]
    later, plan = transition(after, Schedule(), 8)
    assert plan.chunks and after.in_flight is None and later.in_flight is not None
    assert plan.decisions[0].now_us == 8 and "admit" in str(plan.decisions[0])


def test_events_survive_json() -> None:
    for event in (Arrive(1, 2, 3, 4, True, False), Schedule(), Abort(3), Preempt(4)):
        assert event_from_record(json.loads(json.dumps(event_record(event, 5)))) == (event, 5)
    commit = Commit(((1, "stop"), (2, "length")))
    assert event_from_record(json.loads(json.dumps(event_record(commit, 6)))) == (commit, 6)
