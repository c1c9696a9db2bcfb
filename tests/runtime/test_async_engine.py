"""AsyncEngine in real event loops: streams, cancellation, the bounded queue, drain, watchdog."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import aios_compile
from aios_compile import AsyncEngine
from aios_compile.errors import (
    EngineClosedError,
    EngineDrainingError,
    EngineError,
    EngineStalledError,
    QueueFullError,
    RequestError,
)
from aios_compile.runtime.engine import Engine
from tests.runtime.conftest import MakeEngine, checked_engine
from tests.runtime.fake_executor import FakeTokenizer, greedy
from tests.runtime.test_lifecycle import fake, is_idle

PROMPT = [1, 2, 3]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        await asyncio.sleep(0.001)


def run(engine: Engine, work: Callable[[AsyncEngine], Awaitable[Any]], **options: Any) -> None:
    """Run `work` with an AsyncEngine in an event loop of its own, for 20 s at most."""

    async def main() -> None:
        async with AsyncEngine(engine, **options) as served:
            await work(served)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_it_is_a_lazy_attribute_of_the_package() -> None:
    assert aios_compile.AsyncEngine is AsyncEngine and "AsyncEngine" in dir(aios_compile)


def test_many_streams_give_the_right_tokens_and_texts(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeTokenizer())
    expected = {
        i: engine.generate([[i, i + 1]], temperature=0, max_tokens=20, logprobs=1)[0]
        for i in range(12)
    }

    async def work(served: AsyncEngine) -> None:
        async def read(i: int) -> None:
            text, ids, logprobs = "", [], []
            stream = served.generate([i, i + 1], temperature=0, max_tokens=20, logprobs=1)
            async for chunk in stream:
                text += chunk.text
                ids += chunk.token_ids
                logprobs += chunk.logprobs or []
            output = expected[i].outputs[0]
            assert (text, ids, logprobs) == (output.text, output.token_ids, output.logprobs)
            assert stream.output().outputs[0] == output

        await asyncio.gather(*(read(i) for i in expected))

    run(engine, work)


@pytest.mark.parametrize("how", ["cancel", "aclose", "break", "drop", "abort"])
def test_what_nobody_reads_frees_its_pages_within_a_step(how: str, make_engine: MakeEngine) -> None:
    engine = make_engine()
    fake(engine).step_seconds = 0.01

    async def work(served: AsyncEngine) -> None:
        stream: Any = served.generate(PROMPT, max_tokens=60)
        await anext(stream)

        async def read_all() -> None:
            async for _ in stream:
                pass

        if how == "cancel":
            task = asyncio.create_task(read_all())
            await asyncio.sleep(0.03)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "aclose":
            await stream.aclose()
        elif how == "abort":
            assert served.abort(stream.request_id)
            assert [c.finish_reason async for c in stream][-1] == "abort"
            assert not served.abort(stream.request_id)
        elif how == "break":
            async for _ in stream:
                break
        steps = engine.stats.num_steps
        if how in ("break", "drop"):
            del stream
            gc.collect()
        await until(lambda: is_idle(engine))
        assert engine.stats.num_steps <= steps + 1
        assert served.num_open == 0

    run(engine, work)


def test_a_refusal_is_raised_by_submit_and_by_the_first_chunk(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def work(served: AsyncEngine) -> None:
        for prompt, fields in (([999], {}), (PROMPT, {"n": 0}), (PROMPT, {"temprature": 1})):
            with pytest.raises(RequestError):
                await served.generate(prompt, **fields).submit()
            with pytest.raises(RequestError):
                await anext(served.generate(prompt, **fields))
        assert served.metrics().value("request_errors_total", code="bad_request") == 6
        assert engine.stats.num_requests == 0

    run(engine, work)


def test_a_full_queue_refuses_with_a_hint_and_takes_more_later(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    fake(engine).step_seconds = 0.005

    async def work(served: AsyncEngine) -> None:
        streams, refused = [], 0
        for _ in range(12):
            stream = served.generate(PROMPT, temperature=0, max_tokens=10)
            try:
                await stream.submit()
                streams.append(stream)
            except QueueFullError as error:
                refused += 1
                assert 1 <= error.retry_after_s <= 60
                assert f"again in {error.retry_after_s} s" in str(error)
        assert refused >= 6 and 4 <= len(streams) <= 6
        assert served.metrics().value("request_errors_total", code="queue_full") == refused
        for result in await asyncio.gather(*(s.result() for s in streams)):
            assert result.outputs[0].token_ids == greedy(PROMPT, 10)
        output = await served.result(PROMPT, temperature=0, max_tokens=3)
        assert output.outputs[0].token_ids == greedy(PROMPT, 3)

    run(engine, work, max_waiting=4)


def test_the_retry_hint_follows_the_rate_of_the_past(make_engine: MakeEngine) -> None:
    metrics = make_engine()._core.metrics
    assert metrics.retry_after_s(100, 0) == 1  # nothing is known yet
    for i in range(10):
        metrics.on_end(i * 2_000_000, 0, "stop")
    assert metrics.retry_after_s(5, 20_000_000) == 10  # one every two seconds
    assert metrics.retry_after_s(1000, 20_000_000) == 60


def test_drain_finishes_what_runs_and_takes_nothing_new(make_engine: MakeEngine) -> None:
    engine = make_engine()
    fake(engine).step_seconds = 0.005

    async def work(served: AsyncEngine) -> None:
        streams = [served.generate(PROMPT, temperature=0, max_tokens=30) for _ in range(3)]
        for stream in streams:
            await stream.submit()
        readers = asyncio.gather(*(stream.result() for stream in streams))
        assert not await served.drain(timeout_s=0.01)
        with pytest.raises(EngineDrainingError):
            await served.generate(PROMPT).submit()
        health = served.health()
        assert health.live and not health.ready and "draining" in health.reason
        assert await served.drain(timeout_s=10) and served.num_open == 0
        for result in await readers:
            assert result.outputs[0].token_ids == greedy(PROMPT, 30)

    run(engine, work)


def test_close_ends_readers_with_an_error(make_engine: MakeEngine) -> None:
    engine = make_engine()
    fake(engine).step_seconds = 0.01

    async def work(served: AsyncEngine) -> None:
        stream = served.generate(PROMPT, max_tokens=60)
        await anext(stream)
        task = asyncio.create_task(stream.result())
        await asyncio.sleep(0.02)
        await served.close()
        with pytest.raises(EngineClosedError):
            await task
        assert not served.health().live
        with pytest.raises(EngineClosedError):
            await served.generate(PROMPT).submit()

    run(engine, work)


def test_the_watchdog_notices_a_step_that_hangs_and_its_recovery() -> None:
    engine = checked_engine()
    hang = threading.Event()
    stuck = threading.Event()

    def block(batch: Any) -> None:
        if fake(engine).num_steps == 4:
            stuck.set()
            hang.wait(10)

    fake(engine).before_step = block

    async def work(served: AsyncEngine) -> None:
        stream = served.generate(PROMPT, max_tokens=60, seed=1)
        with pytest.raises(EngineStalledError, match="a step has been running for"):
            await stream.result()
        assert stuck.is_set()
        health = served.health()
        assert not health.live and not health.ready and health.stalled
        with pytest.raises(EngineStalledError):
            await served.generate(PROMPT).submit()
        hang.set()
        await until(lambda: served.health().ready)
        await until(lambda: is_idle(engine))
        output = await served.result(PROMPT, temperature=0, max_tokens=4)
        assert output.outputs[0].token_ids == greedy(PROMPT, 4)

    run(engine, work, stall_s=0.4, probe_s=1.0)


def test_an_idle_engine_is_ready_only_while_probes_pass(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def work(served: AsyncEngine) -> None:
        await until(lambda: served.health().ready)  # a probe: nobody has asked for anything
        steps = engine.stats.num_steps
        await until(lambda: engine.stats.num_steps > steps)
        metrics = served.metrics()
        assert metrics.value("time_to_first_token_seconds", "_count") == 0, "a probe was counted"
        assert metrics.value("prompt_tokens_total") == 0

        def fail(batch: Any) -> None:
            raise MemoryError("planted")

        fake(engine).before_step = fail
        await until(lambda: not engine._thread.is_alive() or not served.health().ready)

    run(engine, work, stall_s=0.3, probe_s=0.1)


def test_a_dead_thread_is_neither_live_nor_ready(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine._core._committer.apply = None  # type: ignore[method-assign, assignment]

    async def work(served: AsyncEngine) -> None:
        with pytest.raises(EngineClosedError):
            await served.result(PROMPT)
        await until(lambda: not served.health().live)
        assert not served.health().ready

    run(engine, work)


def test_a_long_text_is_tokenised_outside_of_the_loop(make_engine: MakeEngine) -> None:
    class Slow(FakeTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            time.sleep(0.6)
            return [1] * 10

    engine = make_engine(Slow(), max_model_len=8192)

    async def work(served: AsyncEngine) -> None:
        async def longest_gap() -> float:
            gap, last = 0.0, time.monotonic()
            for _ in range(200):
                await asyncio.sleep(0.004)
                gap, last = max(gap, time.monotonic() - last), time.monotonic()
            return gap

        lag = asyncio.create_task(longest_gap())
        output = await served.result("a" * 20_000, temperature=0, max_tokens=3)
        assert output.outputs[0].token_ids == greedy([1] * 10, 3)
        assert await lag < 0.4, "the loop stood still while a text was tokenised"
        stream = served.generate("a" * 20_000, max_tokens=50)
        task = asyncio.create_task(stream.submit())
        await asyncio.sleep(0.05)
        task.cancel()  # the thread goes on tokenising; what it submits is aborted
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats.num_requests >= 2)
        await until(lambda: is_idle(engine))

    run(engine, work)


def test_another_event_loop_is_refused(make_engine: MakeEngine) -> None:
    served = AsyncEngine(make_engine())

    async def once() -> None:
        await served.result(PROMPT, max_tokens=2)

    asyncio.run(once())
    with pytest.raises(EngineError, match="another event loop"):
        asyncio.run(once())


def test_a_thousand_disconnects_leave_nothing_behind(make_engine: MakeEngine) -> None:
    """R16: pages, tasks and requests are back at their baseline."""
    engine = make_engine(FakeTokenizer())

    async def work(served: AsyncEngine) -> None:
        async def client(i: int) -> None:
            stream = served.generate([i % 50, 3], max_tokens=40, seed=i)
            async for _ in stream:
                if i % 7 == 0:
                    return
                await asyncio.sleep(0)

        for first in range(0, 1000, 50):
            tasks = [asyncio.create_task(client(i)) for i in range(first, first + 50)]
            await asyncio.sleep(0.002)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: is_idle(engine))
        assert len(asyncio.all_tasks()) <= 3 and served.num_open == 0
        assert engine._core.inbox.num_waiting == 0 and not engine._core.sequences

    run(engine, work)
