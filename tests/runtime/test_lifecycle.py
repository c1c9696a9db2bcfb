"""Threads, Ctrl-C, fork, abort, close, failing executors, NaN: everybody gets an answer."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aios_compile.errors import EngineClosedError, EngineError
from aios_compile.runtime.engine import Engine
from aios_compile.sampling_params import SamplingParams
from tests.runtime.conftest import MakeEngine
from tests.runtime.fake_executor import FakeExecutor, FakeTokenizer, greedy, limits

PROMPT = [1, 2, 3]
ROOT = Path(__file__).parents[2]


def fake(engine: Engine) -> FakeExecutor:
    executor = engine._core.executor
    assert isinstance(executor, FakeExecutor)
    return executor


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


def is_idle(engine: Engine) -> bool:
    pool = engine._core.state.pool
    return not engine._core.requests and pool.num_free == pool.num_pages - 1


def test_generate_from_several_threads(make_engine: MakeEngine) -> None:
    engine = make_engine()
    results: dict[int, list[int]] = {}

    def work(i: int) -> None:
        for _ in range(5):
            output = engine.generate([[i, i + 1]], temperature=0, max_tokens=10)[0]
            results[i] = output.outputs[0].token_ids
            assert np.array_equal(engine.logits([i])[0].argmax(), greedy([i], 1)[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {i: greedy([i, i + 1], 10) for i in range(8)}
    assert is_idle(engine)


def test_two_engines_at_once(make_engine: MakeEngine) -> None:
    one, two = make_engine(), make_engine(page_size=2, vocab_size=40)
    streams = [one.stream(PROMPT, temperature=0, max_tokens=20) for _ in range(2)]
    other = two.generate([PROMPT], temperature=0, max_tokens=20)[0]
    assert other.outputs[0].token_ids == greedy(PROMPT, 20, vocab_size=40)
    for stream in streams:
        assert [t for c in stream for t in c.token_ids] == greedy(PROMPT, 20)


def test_abort_frees_pages_and_gives_what_there_is(make_engine: MakeEngine) -> None:
    engine = make_engine(FakeTokenizer())
    fake(engine).step_seconds = 0.005
    stream = engine.stream(PROMPT, temperature=0, max_tokens=50)
    next(stream)
    assert engine.abort(stream.request_id)
    chunks = list(stream)
    assert chunks[-1].finish_reason == "abort"
    output = stream.output().outputs[0]
    assert output.finish_reason == "abort"
    assert 0 < len(output.token_ids) < 50
    assert output.token_ids == greedy(PROMPT, len(output.token_ids))
    assert is_idle(engine) and not engine.abort(stream.request_id)


def test_a_dropped_or_closed_stream_is_aborted(make_engine: MakeEngine) -> None:
    engine = make_engine()
    fake(engine).step_seconds = 0.002
    for how in ("close", "drop", "never read"):
        stream = engine.stream(PROMPT, max_tokens=60)
        if how != "never read":
            next(stream)
        if how == "close":
            stream.close()
        del stream
        gc.collect()
        wait_until(lambda: is_idle(engine))
    assert engine.stats.num_steps < 60


def test_close_answers_everybody_and_is_idempotent(make_engine: MakeEngine) -> None:
    engine = make_engine()
    fake(engine).step_seconds = 0.01
    errors: list[Exception] = []

    def work() -> None:
        try:
            engine.generate([PROMPT] * 6, max_tokens=60)
        except EngineClosedError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    stream = engine.stream(PROMPT, max_tokens=60)
    wait_until(lambda: engine.stats.num_steps > 2)
    engine.close()
    engine.close()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 3 and fake(engine).num_closed == 1
    with pytest.raises(EngineClosedError):
        list(stream)
    for call in (lambda: engine.generate([PROMPT]), lambda: engine.logits(PROMPT)):
        with pytest.raises(EngineClosedError, match="load the model again"):
            call()
    wait_until(lambda: not engine._thread.is_alive())


def test_an_engine_that_nobody_holds_is_closed() -> None:
    executor = FakeExecutor(limits())
    engine = Engine(executor)
    engine.generate([PROMPT], max_tokens=2)
    thread, gone = engine._thread, weakref.ref(engine)
    del engine
    gc.collect()
    wait_until(lambda: executor.num_closed == 1)
    thread.join(10)
    assert gone() is None and not thread.is_alive()


def test_an_executor_that_raises_ends_its_batch_only(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    executor = fake(engine)
    executor.step_seconds = 0.005

    def fail_once(batch: Any) -> None:
        if executor.num_steps == 3:
            raise MemoryError("planted")

    executor.before_step = fail_once
    streams = [engine.stream(PROMPT, temperature=0, max_tokens=20) for _ in range(4)]
    for stream in streams[:2]:
        with pytest.raises(EngineError, match="MemoryError: planted"):
            list(stream)
    for stream in streams[2:]:
        assert [t for c in stream for t in c.token_ids] == greedy(PROMPT, 20)
    assert is_idle(engine)


def test_an_executor_that_is_not_usable_any_more_closes_the_engine() -> None:
    engine = Engine(FakeExecutor(limits(max_num_seqs=1)))
    executor = fake(engine)
    executor.usable = False

    def fail(batch: Any) -> None:
        raise OSError("planted")

    executor.before_step = fail
    results: list[type[Exception]] = []

    def work() -> None:
        try:
            engine.generate([PROMPT])
        except EngineError as error:
            results.append(type(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(results) == 3 and EngineError in results
    with pytest.raises(EngineClosedError, match="planted"):
        engine.generate([PROMPT])
    assert executor.num_closed == 1


def test_a_failure_of_the_runtime_itself_hangs_nobody() -> None:
    engine = Engine(FakeExecutor(limits()))
    engine._core._committer.apply = None  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineClosedError, match="the engine failed: TypeError"):
        engine.generate([PROMPT])
    with pytest.raises(EngineClosedError):
        engine.generate([PROMPT])


def test_not_finite_logits_fail_that_request_alone(make_engine: MakeEngine) -> None:
    """Trap 25: NaN logits streamed out as an ordinary answer."""
    engine = make_engine(FakeTokenizer())

    def spoil(batch: Any, logits: Any) -> None:
        for row, token in enumerate(batch.logit_rows.tolist()):
            s = int(np.searchsorted(batch.query_starts, token, side="right")) - 1
            first = fake(engine).tokens[batch.page_tables[s][0] * engine.admission.limits.page_size]
            if first == 7 and batch.positions[token] == 6:
                logits[row, 3] = np.nan

    fake(engine).after_logits = spoil
    prompts = [[1, 2, 3], [7, 8, 9], [4, 5]]
    outputs = engine.generate(prompts, temperature=0, max_tokens=12, n=1)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    assert outputs[1].outputs[0].token_ids == greedy([7, 8, 9], 4)
    for i in (0, 2):
        assert outputs[i].outputs[0].token_ids == greedy(prompts[i], 12)
    many = engine.generate([[7, 8, 9]], n=3, max_tokens=12)[0].outputs
    assert [o.finish_reason for o in many] == ["error"] * 3
    assert is_idle(engine)


CTRL_C = """
import sys, signal, threading
sys.path.insert(0, {root!r})
from tests.runtime.conftest import checked_engine
from tests.runtime.fake_executor import greedy
from tests.runtime.test_lifecycle import fake, is_idle, wait_until
engine = checked_engine()
fake(engine).step_seconds = 0.02
fake(engine).before_step = lambda batch: print("step", flush=True)
other = []
def work():
    other.append(engine.generate([[9, 9]], temperature=0, max_tokens=30)[0].outputs[0].token_ids)
thread = threading.Thread(target=work)
thread.start()
try:
    if {stream}:
        for chunk in engine.stream([1], max_tokens=60): pass
    else:
        engine.generate([[1]] * 3, max_tokens=60)
    print("not interrupted")
except KeyboardInterrupt:
    thread.join()
    assert other == [greedy([9, 9], 30)], "another thread's request was disturbed"
    wait_until(lambda: is_idle(engine))
    assert engine.stats.num_steps < 50, "the interrupted requests ran on"
    fake(engine).step_seconds = 0
    again = engine.generate([[1]], temperature=0, max_tokens=5)[0].outputs[0].token_ids
    assert again == greedy([1], 5)
    print("interrupted and fine", flush=True)
"""


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_aborts_the_callers_requests_and_goes_on(stream: bool) -> None:
    script = CTRL_C.format(root=str(ROOT), stream=stream)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in a shell's background ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for _ in range(4):
        assert process.stdout.readline().startswith("step")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert "interrupted and fine" in out, err
    assert process.returncode == 0 and "not interrupted" not in out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_an_error_and_the_parent_goes_on(make_engine: MakeEngine) -> None:
    engine = make_engine()
    fake(engine).step_seconds = 0.002
    stream = engine.stream(PROMPT, temperature=0, max_tokens=50)
    next(stream)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # a deadlock ends the child
        code = 1
        try:
            calls = (
                lambda: engine.generate([PROMPT]),
                lambda: engine.stream(PROMPT),
                lambda: engine.logits(PROMPT),
                lambda: engine.abort(0),
                lambda: next(stream),
            )
            for call in calls:
                with pytest.raises(EngineClosedError, match="load the model again"):
                    call()
            stream.close()
            engine.close()
            code = 0 if fake(engine).num_closed == 0 else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    ids = [t for c in stream for t in c.token_ids]
    assert ids == greedy(PROMPT, 50)[-len(ids) :] and len(ids) > 40


def test_an_open_engine_does_not_hold_up_the_exit_of_python() -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.runtime.conftest import checked_engine
engine = checked_engine()
stream = engine.stream([1], max_tokens=60)
engine._core.executor.close = lambda: print("executor closed", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert "executor closed" in done.stdout and not done.stderr


def test_the_runtime_imports_no_torch() -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["torch"] = None
import aios_compile.runtime.engine
assert "tokenizers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)


def test_an_abort_of_what_was_interrupted_while_it_was_submitted(make_engine: MakeEngine) -> None:
    """Ctrl-C between two statements of `submit`: numbered and registered, never handed over."""
    engine = make_engine()
    core = engine._core
    request = engine._request([1, 2], SamplingParams(max_tokens=2), "")
    with core.inbox._wake:
        request.number(900, 900, 0, 0)
        core.inbox.requests[900] = request
    core.inbox.abort([request])
    outputs = engine.generate([[1, 2, 3]], temperature=0, max_tokens=4)
    assert outputs[0].outputs[0].token_ids == greedy([1, 2, 3], 4) and 900 not in core.requests
