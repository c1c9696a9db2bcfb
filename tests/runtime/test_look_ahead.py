"""Steps begun before the one that runs has ended: nobody sees them, in tokens or in the log."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aios_compile.errors import EngineError
from aios_compile.runtime.batch import Batch
from aios_compile.runtime.batch_builder import BatchBuilder
from aios_compile.runtime.overlap_governor import OverlapGovernor
from aios_compile.sampling_params import SamplingParams
from tests.runtime.conftest import checked_engine
from tests.runtime.fake_executor import FakeExecutor, FakeTokenizer, greedy, limits
from tests.runtime.fake_gpu import FakeGpu

KINDS: list[dict[str, Any]] = [
    {}, {"logprobs": 2}, {"stop": ["a", "the"]}, {"temperature": 0.0}, {"n": 2},
    {"stop_token_ids": [7, 9]},
]  # fmt: skip
UNKNOWN = {3: {"repetition_penalty": 1.4}, 4: {"min_tokens": 9}}  # the next step is not foreseen
PROMPTS = [[i, 3, 5, 2, 8][: 1 + i % 5] for i in range(24)]
EXECUTORS = [FakeExecutor, FakeGpu]


def told(engine: Any) -> tuple[list[Any], list[Any]]:
    """Return all that callers and the log see of a few requests, but for the clock."""
    params = [
        SamplingParams(max_tokens=9 + i % 11, seed=i, **UNKNOWN.get(i, KINDS[i % len(KINDS)]))
        for i in range(len(PROMPTS))
    ]
    outputs = engine.generate(PROMPTS, params)
    log = [(d.step, d.kind, d.sequences, d.reason, d.detail) for d in engine.log.ring]
    return [output.outputs for output in outputs], log


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_pages": 60},
        {"num_pages": 20, "max_num_seqs": 8},
        {"num_pages": 30, "max_num_seqs": 8, "token_buckets": (4, 8, 16)},
    ],
)
def test_all_is_as_without_it(kind: Any, options: dict[str, Any]) -> None:
    """Ends by tokens and texts that nobody foresees, borders of pages, shortages, newcomers."""
    found, counts = [], []
    for overlap in ("never", "always"):
        executor = (FakeExecutor if overlap == "never" else kind)(limits(**options))
        executor.overlap = overlap
        engine = checked_engine(FakeTokenizer(), executor=executor, eos_token_ids=[11, 12])
        found.append(told(engine))
        counts.append((engine.stats.num_steps_ahead, engine.stats.num_steps_in_vain))
        engine.close()
    assert found[0] == found[1]
    assert counts[0] == (0, 0) and counts[1][0] > 0, counts


def test_a_full_prefix_cache_does_not_end_it() -> None:
    """All pages are cached once an engine has run for a while. Steps that begin a page were not
    foreseen then: of many sequences that is nearly every one (here 3 of 41 were).
    """
    executor = FakeExecutor(limits(num_pages=110, max_num_seqs=8))
    executor.overlap = "always"
    engine = checked_engine(FakeTokenizer(), executor=executor)
    fields = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    counts = []
    for turn in range(3):
        stats = engine.stats
        before = stats.num_steps_ahead, stats.num_steps, stats.num_steps_in_vain
        engine.generate([[turn, i, 7, 1, 2, 3, 4][: 2 + i % 5] for i in range(8)], **fields)
        after = stats.num_steps_ahead, stats.num_steps, stats.num_steps_in_vain
        counts.append(tuple(b - a for a, b in zip(before, after)))
    assert stats.num_evictions > 20, "the cache was full"
    engine.close()
    for ahead, steps, in_vain in counts:
        assert ahead >= steps - 4 and in_vain <= 1, counts


def watched(executor: Any) -> Any:
    """Let a test act at the moment a step is begun ahead: it sets `then`."""
    plain, executor.then = executor.begin, None

    def begin(batch: Batch, sources: Any = None, hold: Any = None) -> Any:
        step = plain(batch, sources, hold)
        if sources is not None and executor.then is not None:
            then, executor.then = executor.then, None
            then()
        return step

    executor.begin = begin
    return executor


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("seed", range(4))
def test_what_callers_leave_holds_the_next_step_back(kind: Any, seed: int) -> None:
    """A request that comes while a step runs is in the next one, or at latest in the one after."""
    executor = watched(kind(limits(num_pages=60)))
    executor.random.seed(seed)
    engine = checked_engine(executor=executor)
    streams: list[Any] = []
    steps: list[int] = []

    def come() -> None:
        steps.append(engine.stats.num_steps)
        streams.append(engine.stream([9, 9], temperature=0, max_tokens=3))

    executor.then = come
    output = engine.generate([[1, 2, 3]], temperature=0, max_tokens=12)[0]
    assert output.outputs[0].token_ids == greedy([1, 2, 3], 12)
    assert [i for chunk in streams[0] for i in chunk.token_ids] == greedy([9, 9], 3)
    (admitted,) = [d for d in engine.log.ring if d.kind == "admit" and d.sequences == (1,)]
    assert admitted.step - steps[0] in (0, 1)
    assert not engine.stats.num_steps_in_vain, "a step that had its turn is committed first"
    engine.close()


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_deadline_is_kept_while_every_step_is_begun_ahead(kind: Any) -> None:
    executor = kind(limits(num_pages=60))
    executor.step_seconds = 0.01
    engine = checked_engine(executor=executor)
    output = engine.generate([[1, 2, 3]], temperature=0, max_tokens=60, timeout_s=0.12)[0]
    assert output.outputs[0].finish_reason == "abort" and engine.stats.num_steps_ahead
    assert len(output.outputs[0].token_ids) < 40
    engine.close()


def test_a_failing_step_ends_its_own_requests_alone() -> None:
    """Of a step that fails nothing is left, nor of the one that was begun behind it."""
    executor = FakeExecutor(limits(num_pages=60))
    engine = checked_engine(executor=executor)

    def fail(batch: Batch) -> None:
        if executor.num_steps == 6:
            raise RuntimeError("planted")

    executor.before_step = fail
    with pytest.raises(EngineError, match="planted"):
        engine.generate([[1, 2, 3]], temperature=0, max_tokens=20)
    output = engine.generate([[4, 5]], temperature=0, max_tokens=9)[0]
    assert output.outputs[0].token_ids == greedy([4, 5], 9)
    engine.close()


@pytest.mark.parametrize("kind", EXECUTORS)
def test_a_guess_with_an_old_page_table_is_seen(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the page of the next token is not looked up, so it is the one before."""
    plain = BatchBuilder.build_next

    def build_next(self: Any, sequences: Any, states: Any, starts: Any, new_pages: Any) -> Batch:
        old = {row: states[row].pages[-1] for row in new_pages}
        return plain(self, sequences, states, starts, old)

    monkeypatch.setattr(BatchBuilder, "build_next", build_next)
    engine = checked_engine(executor=kind(limits(num_pages=60)))
    try:
        output = engine.generate([[1, 2, 3]], temperature=0, max_tokens=20)[0]
        assert output.outputs[0].token_ids != greedy([1, 2, 3], 20)
    except EngineError as error:
        assert "foreign" in str(error)
    finally:
        engine.close()


@pytest.mark.parametrize("kind", EXECUTORS)
def test_ids_of_a_guess_come_from_the_step_before(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: rows are taken from one place further on, as after a sequence has left."""
    plain = kind.begin

    def begin(self: Any, batch: Batch, sources: Any = None, hold: Any = None) -> Any:
        shifted = None if sources is None else np.roll(sources, 1)
        return plain(self, batch, shifted, hold)

    monkeypatch.setattr(kind, "begin", begin)
    engine = checked_engine(executor=kind(limits(num_pages=60)))
    prompts = [[1, 2, 3], [7, 8, 9]]
    outputs = engine.generate(prompts, temperature=0, max_tokens=12)
    engine.close()
    assert [o.outputs[0].token_ids for o in outputs] != [greedy(p, 12) for p in prompts]


def test_the_better_way_is_kept_for_a_while_and_tried_again() -> None:
    governor = OverlapGovernor()
    times = {1: (100.0, 300.0), 4: (200.0, 205.0), 16: (700.0, 560.0)}  # plain, ahead
    ways: dict[int, list[bool]] = {1: [], 4: [], 16: []}
    for step in range(1500):
        if step == 700:
            times[1] = (100.0, 90.0)  # a core has become free
        for count, (plain, ahead) in times.items():
            wants = governor.wants(count)
            ways[count].append(wants)
            late = step % 2 if wants and count == 1 else 0.5  # by turns: the mean is what counts
            governor.measure(count, wants, 2 * late * (ahead if wants else plain))
    assert not any(ways[1][40:500]) and all(ways[16][40:500])
    assert all(ways[4][40:500]), "a loss as small as noise is none"
    assert sum(ways[1][:700]) <= 32 and sum(ways[16][:700]) >= 700 - 32
    assert all(ways[1][-200:])
