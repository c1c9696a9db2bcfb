"""Famous bugs of other engines, planted here; the tests' own instruments must see each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aios_compile.errors import EngineError
from aios_compile.runtime import block_manager, engine_core, look_ahead, preemption
from aios_compile.runtime.batch_builder import BatchBuilder
from aios_compile.runtime.events import Abort, Arrive, Schedule
from aios_compile.runtime.kv_cache import PagePool
from aios_compile.runtime.schedule_state import SchedulerState
from aios_compile.runtime.scheduler import advance
from tests.runtime.conftest import checked_engine
from tests.runtime.fake_executor import limits

PROMPTS = [[1, 2, 3, 4, 5, 6], [6] * 9, [7, 8]]


def answers(**options: Any) -> list[list[int]]:
    engine = checked_engine(**options)
    try:
        outputs = engine.generate(PROMPTS, seed=3, max_tokens=12, n=2)
    finally:
        engine.close()
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.fixture(scope="module", autouse=True)
def unharmed() -> list[list[int]]:
    """What the runtime says before anything is planted."""
    return answers(num_pages=30)


def expect_caught(unharmed: list[list[int]], **options: Any) -> None:
    """Run a few requests; the canary, an integrity check or the answer itself must tell."""
    try:
        if answers(**options) != unharmed:
            return
    except (AssertionError, EngineError):
        return
    pytest.fail("the planted bug was not seen")


def test_the_unharmed_runtime_passes(unharmed: Any) -> None:
    with pytest.raises(pytest.fail.Exception, match="not seen"):
        expect_caught(unharmed, token_buckets=(4, 8, 16))


def test_padding_slot_minus_one_writes_the_last_page(
    unharmed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm#43869: -1 is the last slot."""
    plain = BatchBuilder._pad

    def pad(self: BatchBuilder, start: int, end: int) -> None:
        plain(self, start, end)
        self._slots[start:end] = -1

    monkeypatch.setattr(BatchBuilder, "_pad", pad)
    expect_caught(unharmed, token_buckets=(4, 8, 16))


def test_lengths_frozen_at_the_first_step(unharmed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """trtllm#17110: host values baked into a captured graph."""
    plain = BatchBuilder.build

    def build(self: BatchBuilder, *args: Any) -> Any:
        batch = plain(self, *args)
        graphs = self.__dict__.setdefault("graphs", {})  # one captured graph a batch size
        lengths = batch.context_lengths
        lengths[:] = graphs.setdefault(len(lengths), lengths.copy())
        return batch

    monkeypatch.setattr(BatchBuilder, "build", build)
    expect_caught(unharmed)


def test_a_page_that_joins_between_equal_batches_is_not_seen(
    unharmed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept from step to step must notice that a decode went on to another page."""
    plain = BatchBuilder._move_on

    def move_on(self: BatchBuilder, steady: Any, *args: Any) -> Any:
        steady.marks = [(state.page_epoch, len(state.pages)) for state in steady.states]
        return plain(self, steady, *args)

    monkeypatch.setattr(BatchBuilder, "_move_on", move_on)
    expect_caught(unharmed)


def test_a_step_that_was_begun_ahead_is_taken_for_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asynchronous scheduling: rows of sequences that have ended meanwhile shift the others'."""
    ends = {"eos_token_ids": [5, 19]}  # which nobody foresees
    expected = answers(**ends)
    monkeypatch.setattr(look_ahead, "_is", lambda plan, guess, states: True)
    expect_caught(expected, **ends)


def test_chunk_off_by_one_at_a_page_boundary(
    unharmed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = BatchBuilder._write_chunk

    def write(self: BatchBuilder, token: int, s: int, chunk: Any, sequence: Any) -> None:
        plain(self, token, s, chunk, sequence)
        here = slice(token, token + chunk.num_tokens)
        size, positions = self.limits.page_size, self._positions[here]
        wrong = np.maximum(positions - 1, 0) // size
        self._slots[here] = self._page_tables[s][wrong] * size + positions % size

    monkeypatch.setattr(BatchBuilder, "_write_chunk", write)
    expect_caught(unharmed)


def test_a_shared_page_written_without_a_copy(
    unharmed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PagePool, "is_shared", lambda self, page: False)
    expect_caught(unharmed)


def test_copies_of_shared_pages_forgotten(unharmed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any) -> Any:
        plan = advance(*args)
        plan.copies.clear()
        return plan

    monkeypatch.setattr(engine_core, "advance", forgetful)
    expect_caught(unharmed)


def test_preempted_tokens_taken_for_computed(
    unharmed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = block_manager.release

    def release(state: Any, sequence: Any, **how: Any) -> None:
        computed = sequence.num_computed
        plain(state, sequence, **how)
        sequence.num_computed = computed

    monkeypatch.setattr(preemption, "release", release)
    expect_caught(unharmed, num_pages=7)


def test_pages_released_twice(unharmed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PagePool.release

    def release(self: PagePool, pages: Any) -> None:
        plain(self, pages)
        self.free.extend(pages[:1])

    monkeypatch.setattr(PagePool, "release", release)
    expect_caught(unharmed)


def test_pages_of_a_running_step_are_not_given_away() -> None:
    """A cancelled request's pages were reused while a step still wrote them."""
    state = SchedulerState.empty(limits())
    advance(state, Arrive(0, 0, 5), 0)
    advance(state, Schedule(), 0)
    with pytest.raises(AssertionError, match="running step"):
        advance(state, Abort(0), 0)
