"""The engine in its own process: killed, hung or failing, no request loses or repeats a token."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aios_compile import AsyncEngine, SamplingParams
from aios_compile.engine_process import log_of_epoch
from aios_compile.errors import (
    EngineClosedError,
    EngineDiedError,
    EngineError,
    QueueFullError,
    RequestError,
)
from aios_compile.runtime import wire
from aios_compile.runtime.outputs import Logprob, StreamChunk
from aios_compile.runtime.suspects import (
    FROM_OUTSIDE,
    NO_EVIDENCE,
    OWN_DOING,
    Suspects,
    weight,
)
from tests.runtime.fake_executor import greedy
from tests.runtime.killing import answers, fake_front, requests, run_while_killing


def test_kill_9_at_random_moments() -> None:
    """R17. The slow suite does it a hundred times: tests/nightly."""
    asked = requests(24, 1)
    with fake_front(step_seconds=0.003) as front:
        num_done = run_while_killing(front, asked, answers(asked), 8)
        assert front.epoch >= 8 and num_done > 8
        assert front.metrics().value("engine_restarts_total") >= 7


def test_a_stopped_process_is_noticed_and_replaced() -> None:
    asked = requests(8, 2)
    with fake_front(step_seconds=0.003, stall_s=0.6) as front:
        front.wait_until_ready()
        run_while_killing(front, asked, answers(asked), 2, num_clients=3, how=signal.SIGSTOP)
        assert front.epoch >= 2


@pytest.mark.parametrize("what", ["hang_at", "exit_at", "fail_at"])
def test_a_step_that_hangs_exits_or_fails_for_good(what: str) -> None:
    with fake_front(step_seconds=0.002, stall_s=1.0, **{what: 7}) as front:
        streams = [front.stream([i, 3], temperature=0, max_tokens=20) for i in range(3)]
        for i, stream in enumerate(streams):
            if what == "fail_at":  # one clean error for those whose step it was
                with pytest.raises(EngineError, match="MemoryError"):
                    list(stream)
                continue
            chunks = list(stream)
            expected = answers([([i, 3], {"temperature": 0, "max_tokens": 20})])[0]
            assert [t for c in chunks for t in c.token_ids] == expected.outputs[0].token_ids
        output = front.generate([[5, 6]], temperature=0, max_tokens=4)[0].outputs[0]
        assert output.token_ids == greedy([5, 6], 4)
        assert front.epoch == 2


def test_a_request_that_kills_every_engine_ends_alone() -> None:
    """The others, before and after it, get all of their tokens."""
    with fake_front(poison=49, step_seconds=0.002) as front:
        prompts = [[1, 2], [1, 49], [3], [4, 5], [6]]
        streams = [front.stream(p, temperature=0, max_tokens=12, ignore_eos=True) for p in prompts]
        with pytest.raises(EngineDiedError, match="again and again"):
            list(streams[1])
        for i in (0, 2, 3, 4):
            ids = [t for c in streams[i] for t in c.token_ids]
            assert 49 not in ids and ids == greedy(prompts[i], 12)
        assert front.num_requests == 0 and front._suspects.on_trial is None


def test_counters_go_on_over_a_restart() -> None:
    names = ("generation_tokens_total", "steps_total", "requests_finished_total")
    fields = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    with fake_front() as front:
        for epoch in (1, 2, 3):
            front.wait_until_ready()
            front.generate([[1, 2], [3]], **fields)
            end = time.monotonic() + 20  # the pulse comes a little later
            while front.metrics().value("generation_tokens_total") < 16 * epoch:
                assert time.monotonic() < end, front.metrics().prometheus_text()
                time.sleep(0.005)
            before = front.metrics()
            assert front.epoch == epoch and front.child is not None
            os.kill(front.child.process.pid, signal.SIGKILL)
            while front.epoch == epoch:
                assert time.monotonic() < end
                time.sleep(0.005)
            after = front.metrics()
            assert after.value("generation_tokens_total") == 16 * epoch
            assert after.value(names[2], reason="length") == 2 * epoch
            ttft = "time_to_first_token_seconds"
            assert after.value(ttft, "_count") == 2 * epoch
            assert after.value(ttft, "_bucket", le="+Inf") == 2 * epoch
            for name in names[:2]:
                assert after.value(name) >= before.value(name) > 0
        front.wait_until_ready()
        assert front.metrics().value("engine_restarts_total") == 3


def test_suspects() -> None:
    suspects, own, outside = Suspects(), OWN_DOING, FROM_OUTSIDE
    assert suspects.note_death(own, False, [1, 2, 3]) is None and suspects.on_trial is None
    assert suspects.note_death(own, True, [1, 2, 3]) is None, "somebody got a token in between"
    assert suspects.note_death(own, False, [1, 2, 3]) is None
    assert suspects.note_death(own, False, [3, 1, 2]) is None and suspects.on_trial == 1
    assert not suspects.arrive(4)
    assert [suspects.may_run(i) for i in (0, 1, 2, 3, 4)] == [True, True, False, False, False]
    assert suspects.clear(3) is None, "aborted before its turn"
    assert suspects.clear(1) == 2 and suspects.may_run(1)
    assert suspects.note_death(own, True, [1, 2, 4]) is None, "once may be chance"
    for _ in range(2):  # that many points make one death by its own doing
        assert suspects.note_death(outside, True, [1, 2, 4]) is None, "nor kills from outside"
    assert suspects.note_death(NO_EVIDENCE, True, [1, 2, 4]) is None, "it was not ready"
    assert suspects.note_death(outside, True, [1, 2, 4]) == 2 and suspects.on_trial == 4
    assert suspects.clear(4) is None and suspects.on_trial is None and suspects.arrive(5)


def test_what_a_death_says() -> None:
    for status, is_silent, expected in (
        (-signal.SIGSEGV, False, OWN_DOING), (5, False, OWN_DOING), (0, False, OWN_DOING),
        (None, False, OWN_DOING),  # a step hung and we killed it
        (None, True, FROM_OUTSIDE),  # stopped, so nothing was heard
        (-signal.SIGKILL, False, FROM_OUTSIDE), (-signal.SIGTERM, False, FROM_OUTSIDE),
    ):  # fmt: skip
        assert weight(status, is_silent=is_silent) == expected


def test_early_kills_from_outside_condemn_nobody() -> None:
    """The first token takes longer than each of four processes lives, as on a loaded machine."""
    with fake_front(step_seconds=0.4) as front:
        stream = front.stream([1, 2], temperature=0, max_tokens=3, ignore_eos=True)
        for epoch in (1, 2, 3, 4):
            while front.epoch < epoch or front._outbox is None:
                time.sleep(0.002)
            time.sleep(0.05)
            assert front.child is not None
            os.kill(front.child.process.pid, signal.SIGKILL)
        assert [t for c in stream for t in c.token_ids] == greedy([1, 2], 3)
        assert front.epoch == 5


def test_a_process_that_never_starts_is_an_error_for_everybody() -> None:
    with fake_front(is_mute=True) as front:
        stream = front.stream([1])
        with pytest.raises(EngineClosedError, match=r"does not start.*status 3"):
            list(stream)
        with pytest.raises(EngineClosedError, match="does not start"):
            front.wait_until_ready()
        with pytest.raises(EngineClosedError):
            front.stream([1])
        assert not front.health().live


def test_seeds_are_drawn_by_the_front() -> None:
    """Without a seed the tokens are those of an engine in this process."""
    fields = {"temperature": 1.3, "max_tokens": 12}
    expected = answers([([4, 5], fields)])[0].outputs[0].token_ids
    with fake_front() as front:
        output = front.generate([[4, 5]], SamplingParams(temperature=1.3, max_tokens=12))[0]
        assert output.outputs[0].token_ids == expected
        again = front.generate([[4, 5]], temperature=1.3, max_tokens=12)[0]
        assert again.outputs[0].token_ids != expected, "another request, another seed"


def test_refusals_abort_and_the_queue() -> None:
    with fake_front(step_seconds=0.01) as front:
        for prompt, fields in (([999], {}), ([1], {"n": 0}), ([1], {"temprature": 1})):
            with pytest.raises(RequestError):
                front.generate([prompt], **fields)
        for prompt, fields, text in (
            ([1], {"stop": object()}, "plain data"),
            ([1.5], {}, "got 1.5"),
            ([True], {}, "got True"),
            (None, {}, "got a NoneType"),
            ([1 << 65], {}, "more than 64 bits"),
            ("a\ud800", {}, "not valid Unicode"),
        ):
            with pytest.raises(RequestError, match=text):
                front.stream(prompt, **fields)
        again = front.stream([1], stop=iter(["the"]))._request
        assert again.start_message(1) == again.start_message(1), "another process gets less"
        stream = front.stream("the cat", max_tokens=60, ignore_eos=True)
        first = next(stream)
        front.end(stream._request, None)
        rest = list(stream)
        assert rest[-1].finish_reason == "abort" and front.num_requests == 0
        assert stream.output().text == first.text + "".join(c.text for c in rest)
        streams = [front.open_stream([1], None, {}, max_waiting=3) for _ in range(3)]
        with pytest.raises(QueueFullError, match="again in 1 s"):
            front.open_stream([1], None, {}, max_waiting=3)
        for one in streams:
            one.close()


def test_asyncio_over_the_process_with_kills() -> None:
    asked = requests(10, 5)
    expected = answers(asked)
    front = fake_front(step_seconds=0.003)

    async def main() -> None:
        async with AsyncEngine(front, probe_s=0.2) as engine:

            async def read(i: int) -> None:
                prompt, fields = asked[i]
                stream = engine.generate(prompt, **fields)
                await stream.submit()
                chunks = [chunk async for chunk in stream]
                assert "".join(c.text for c in chunks if not c.index) == expected[i].text
                assert stream.output().outputs == expected[i].outputs

            async def kill() -> None:
                for _ in range(2):
                    await asyncio.sleep(0.1)
                    while front._outbox is None:
                        await asyncio.sleep(0.005)
                    assert front.child is not None
                    os.kill(front.child.process.pid, signal.SIGKILL)

            with pytest.raises(RequestError):
                await engine.generate([999]).submit()
            await asyncio.gather(kill(), *(read(i) for i in range(10)))
            end = time.monotonic() + 10
            while not engine.health().ready:
                assert time.monotonic() < end
                await asyncio.sleep(0.01)
            assert "aios_engine_restarts_total" in engine.metrics().prometheus_text()
            stream = engine.generate([1, 2], max_tokens=60, ignore_eos=True)
            await anext(stream)
            await stream.aclose()
            assert front.num_requests == 0
        assert not engine.health().live

    asyncio.run(asyncio.wait_for(main(), 30))


def test_nothing_is_left_behind() -> None:
    front = fake_front()
    front.wait_until_ready()
    folder, child = front._folder, front.child
    assert child is not None
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    front.close()
    front.close()
    assert not folder.exists() and child.process.poll() is not None
    with pytest.raises(EngineClosedError):
        front.stream([1])


def test_an_engine_whose_front_is_gone_ends_itself() -> None:
    script = """
import os, time
from tests.runtime.killing import fake_front
front = fake_front(step_seconds=0.01)
front.wait_until_ready()
stream = front.stream([1], max_tokens=60)
next(stream)
print(front.child.process.pid, flush=True)
os._exit(0)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=30
    )
    pid, end = int(done.stdout), time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the engine process outlives its front"
        time.sleep(0.02)


def test_an_engine_that_talks_nonsense_is_replaced() -> None:
    """Readers are told by the thread that reads; it must not die of what it reads."""
    with fake_front(talks_nonsense=True, step_seconds=0.002) as front:
        output = front.generate([[5, 6]], temperature=0, max_tokens=12)[0].outputs[0]
        assert output.token_ids == greedy([5, 6], 12) and front.epoch == 2


@pytest.mark.parametrize(
    "message", [b"\xc1", b"\x80\x80", b"", b"\x81\x90\x01", b"\x91\x01", b"\x07", b"\x80"]
)
def test_what_is_no_message_is_refused(message: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(EngineError, match=r"msgpack|without its kind"):
        ours.sendall(len(message).to_bytes(4, "big") + message)
        wire.Connection(theirs).receive(1)


def test_each_process_has_a_log_of_its_own() -> None:
    log = Path("some.folder/log.jsonl")
    assert log_of_epoch(log, 1) == log
    assert log_of_epoch(log, 3) == Path("some.folder/log.3.jsonl")


def test_frames() -> None:
    ours, theirs = socket.socketpair()
    one, other = wire.Connection(ours), wire.Connection(theirs)
    message: dict[str, Any] = {"kind": "x", "epoch": 1, "request": 2, "bias": {3: -1.5}}
    frame = wire.pack(message)
    one.send(frame + frame[:5])
    assert other.receive() == message
    with pytest.raises(TimeoutError):
        other.receive(0.01)
    one.send(frame[5:])
    assert other.receive(1) == message
    one.send(frame[:-1])
    one.close()
    assert other.receive() is None, "half a frame is no message"
    ours, theirs = socket.socketpair()
    ours.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(EngineError, match="a frame of 4294967295 bytes"):
        wire.Connection(theirs).receive()
    for each in (ours, theirs):
        each.close()


def test_values_survive_the_wire() -> None:
    logprobs = [{3: Logprob(-0.1234567890123, 1, "a"), 4: Logprob(-1e-30, 2, None)}]
    chunk = StreamChunk("é", [3], "stop", logprobs, 2)
    assert wire.chunk_in(wire.chunk_out(chunk)) == chunk
    error = QueueFullError("full", retry_after_s=7)
    back = wire.error_in(wire.error_out(error))
    assert type(back) is QueueFullError and back.message == "full"
    hidden = wire.error_in(wire.error_out(ValueError("/secret/path")))
    assert type(hidden) is EngineError and "secret" not in str(hidden)
    params = SamplingParams(
        stop=["a"], logit_bias={3: 1.0}, allowed_token_ids=[5, 4], seed=2**64 - 1
    )
    assert SamplingParams(**wire.params_fields(params)) == params
