"""Steps that a device is asked for ahead: buffers take turns, waits are for marks, errors are told.

The device lags behind the host by a random number of things (tests/interpreted/lagging_device.py)
and watches the host's buffers; every race that is planted here is found by it or by the tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from aios_compile.errors import EngineClosedError, EngineError
from aios_compile.runtime.batch import Batch
from aios_compile.runtime.gpu_step import GpuStep, StepSide
from tests.interpreted.harness import batch
from tests.runtime.conftest import checked_engine
from tests.runtime.fake_executor import FakeTokenizer, greedy, limits
from tests.runtime.fake_gpu import FakeGpu

PROMPTS = [[1, 2, 3], [7, 8, 9, 4], [5], [2, 2]]
WANTED = [greedy(prompt, 16) for prompt in PROMPTS]


def tokens(executor: FakeGpu) -> list[list[int]]:
    """Return what an engine says to PROMPTS."""
    engine = checked_engine(FakeTokenizer(), executor=executor)
    try:
        outputs = engine.generate(PROMPTS, temperature=0, max_tokens=16)
        return [output.outputs[0].token_ids for output in outputs]
    finally:
        engine.close()


@pytest.mark.parametrize("asked", ["0", "1", "2"])
def test_the_switch_changes_no_token(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that runs ahead, steps are begun ahead unless that is switched off."""
    monkeypatch.setenv("AIOS_OVERLAP", asked)
    executor = FakeGpu(limits(num_pages=60))
    assert executor.overlap == ("never" if asked == "0" else "always")
    assert tokens(executor) == WANTED
    ahead = executor.device.most_asked > 5  # four things are a step
    assert ahead == (asked != "0"), "two steps were asked for at once"
    monkeypatch.setattr(type(executor.device), "runs_ahead", False)
    assert executor._overlap() == {"0": "never", "1": "never", "2": "always"}[asked]


def test_a_wait_is_for_the_step_and_not_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one step is waited for, the one behind it may be as it was: not yet run."""
    executor = FakeGpu(limits(num_pages=60))
    executor.device.eagerness = 0.0
    left: list[int] = []
    plain = GpuStep.finish

    def finish(step: GpuStep) -> Any:
        found = plain(step)
        left.append(len(executor.device.queue))
        return found

    monkeypatch.setattr(GpuStep, "finish", finish)
    close, executor.close = executor.close, lambda: None  # type: ignore[method-assign]
    with monkeypatch.context() as patch:
        patch.setattr(executor.device, "synchronize", lambda: pytest.fail("waits for all"))
        assert tokens(executor) == WANTED
    assert max(left) == 5, "a whole step is left: two marks, two copies, a graph"
    close()


class OneBuffer(FakeGpu):
    """Packets are written where the last one may still be read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.staging.writers[1] = self.staging.writers[0]


class OneResult(FakeGpu):
    """Results arrive where the last ones may still be looked at."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.results._host[1] = self.results._host[0]


class EarlyMark(FakeGpu):
    """A step is over when its graph is: before the results have arrived."""

    def _run(self, bucket: int, sizes: Any) -> None:
        super()._run(bucket, sizes)
        self._sides[(self.num_begun - 1) % 2].last.record()

    def _ask(self, bucket: int, side: StepSide) -> None:
        mark, side.last = side.last, Once(side.last)
        super()._ask(bucket, side)
        side.last = mark


class Once:
    """A mark that is recorded the first time alone."""

    def __init__(self, mark: Any) -> None:
        self.record = mark.record

    def __setattr__(self, name: str, value: Any) -> None:
        def once() -> None:
            vars(self)[name] = lambda: None
            value()

        vars(self)[name] = once


class HostIds(FakeGpu):
    """Ids that nobody knows yet are taken from the batch."""

    def begin(self, batch: Batch, sources: Any = None, hold: Any = None) -> GpuStep:
        return super().begin(batch, None, hold)


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        (OneBuffer, "host bytes changed before they were copied"),
        (OneResult, "host bytes have another owner"),
        (EarlyMark, ""),
        (HostIds, ""),
    ],
)
def test_planted_races_are_found(planted: Any, told: str) -> None:
    """By the device, or by the tokens; worthless ids are out of every range."""
    executor = planted(limits(num_pages=60))
    executor.device.eagerness = 0.1
    error = ""
    try:
        assert tokens(executor) != WANTED
    except EngineError as found:
        error = str(found)
    assert told in error


def test_a_device_that_fails_is_told_with_the_step_and_ends_the_engine() -> None:
    """An error arrives at a wait, after the next step was asked for; nothing runs any more."""
    executor = FakeGpu(limits(num_pages=60))
    engine = checked_engine(executor=executor)
    failed: list[int] = []

    def fail(batch: Batch) -> None:
        if executor.num_steps == 6:
            failed.append(executor.num_steps)
            raise RuntimeError("planted")

    executor.before_step = fail
    with pytest.raises(EngineError, match=r"step 6 failed on cpu: .*the device failed: planted"):
        engine.generate([[1, 2, 3]], temperature=0, max_tokens=20)
    assert failed == [6] and not executor.usable and executor.num_begun == 7
    with pytest.raises(EngineClosedError, match="step 6 failed"):
        engine.generate([[4, 5]], temperature=0, max_tokens=2)
    engine.close()


def test_a_batch_that_cannot_be_sent_ends_its_own_requests_alone() -> None:
    executor = FakeGpu(limits(num_pages=60))
    engine = checked_engine(executor=executor)
    fill, executor.staging.fill = executor.staging.fill, lambda *_: 1 // 0  # type: ignore
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        engine.generate([[1, 2, 3]], max_tokens=2)
    executor.staging.fill = fill  # type: ignore[method-assign]
    output = engine.generate([[1, 2, 3]], temperature=0, max_tokens=9)[0]
    assert output.outputs[0].token_ids == greedy([1, 2, 3], 9) and executor.usable
    engine.close()


def test_two_steps_are_begun_and_three_refused() -> None:
    executor = FakeGpu(limits(page_size=16, max_pages_per_sequence=8, num_pages=32))
    executor.device.eagerness = 0.0
    first = executor.begin(batch([(0, 1)]))
    token, following = int(batch([(0, 1)]).token_ids[0]), batch([(1, 1)])
    second = executor.begin(following, np.zeros(1, np.int64))
    assert not first.has_ended and not second.leave_out() and second.make_sure()
    with pytest.raises(AssertionError, match="three steps"):
        executor.begin(batch([(2, 1)]))
    ids = [int(step.wait().sampled_ids[0]) for step in (first, second)]
    assert ids == greedy([token], 2) and first.has_ended and second.number == 2
    executor.close()
    with pytest.raises(EngineClosedError):
        executor.begin(following)
