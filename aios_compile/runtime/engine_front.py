"""The front of an engine that runs in a process of its own, and outlives it.

The front keeps each request's prompt, parameters, seed and emitted tokens. When the engine's
process dies or hangs, another one is started and every request is sent again with what its reader
has; sampling is seeded by (request, position), so it goes on with exactly the right tokens: the
same way as after a preemption::

    callers --open_stream--> requests --outbox--> writer --socket--> engine process (epoch n)
            <---delivery---  requests <---------- reader <--socket--
                                                  process gone: epoch n + 1, all requests again

The socket lies in a folder of mode 0700. Nothing but msgpack goes over it.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aios_compile.errors import (
    AiosError,
    EngineClosedError,
    EngineDiedError,
    EngineError,
    QueueFullError,
    RequestError,
)
from aios_compile.runtime import wire
from aios_compile.runtime.admission import Prompt, whole_numbers
from aios_compile.runtime.engine_child import POLL_S, EngineChild
from aios_compile.runtime.front_request import FrontRequest, FrontStream
from aios_compile.runtime.health import Health, Pulse, judge, now_us
from aios_compile.runtime.metrics import (
    EngineMetrics,
    Family,
    MetricsSnapshot,
    accumulated,
    counter,
)
from aios_compile.runtime.outputs import RequestOutput
from aios_compile.runtime.request import mix_seed
from aios_compile.runtime.suspects import NO_EVIDENCE, Suspects, weight
from aios_compile.sampling_params import SamplingParams

MAX_FAILED_STARTS = 2  # one after another: the model does not load


class EngineFront:
    """Starts an engine process, and another one when it dies; called like runtime.engine.Engine.

    command: the program; its parts "{socket}" and "{epoch}" are replaced. seed: requests without a
    seed get one from this and their number. stall_s: a step that takes longer, or a process that
    is silent for so long, is killed. start_s: how long a start may take (it may compile).
    """

    def __init__(
        self, command: Sequence[str], *, seed: int = 0, stall_s: float = 60.0, start_s: float = 3600
    ) -> None:
        self._command = list(command)
        self._seed = seed
        self._stall_s = stall_s
        self._start_s = start_s
        self._folder = Path(tempfile.mkdtemp(prefix="aios-engine-"))  # its mode is 0700
        self._lock = threading.RLock()
        self._requests: dict[int, FrontRequest] = {}  # guarded by _lock, as is all below
        self._next_request = 0
        self._outbox: queue.SimpleQueue[bytes | None] | None = None  # None: none is connected
        self._closing = False
        self._reason = "the model was closed"
        self._ends = EngineMetrics()
        # of the reader thread
        self._pulse = Pulse()
        self._families: tuple[Family, ...] = ()  # of this process; guarded by _lock, as _counted
        self._counted: tuple[Family, ...] = ()  # by those that are gone
        self._heard = 0.0
        self._has_given = False  # a token since this process started
        self._suspects = Suspects()
        self.child: EngineChild | None = None
        self.epoch = 0
        self._thread = threading.Thread(target=self._run, name="aios-front", daemon=True)
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._thread.start()

    # ---- called from callers' threads; none of them waits for the process

    def open_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        fields: dict[str, Any],
        *,
        on_change: Callable[[], None] | None = None,
        max_waiting: int | None = None,
    ) -> FrontStream:
        """Submit a request; what is wrong with it is told by its stream, when the engine says so.

        Raises QueueFullError at once, and RequestError for values that are no plain data.
        """
        plain = prompt if isinstance(prompt, str) else whole_numbers(prompt)
        fields = wire.as_plain(fields)  # sent again after a death: no iterator that is used up
        with self._lock:
            if self._closing:
                raise EngineClosedError(self._reason, advice="load the model again")
            waiting = sum(not r.has_begun for r in self._requests.values())
            if max_waiting is not None and waiting >= max_waiting:
                raise QueueFullError(
                    f"{waiting} requests wait, expected at most {max_waiting - 1}",
                    retry_after_s=self._ends.retry_after_s(waiting, now_us()),
                )
            number = self._next_request
            params, fields = self._with_seed(params, fields, number)
            request = FrontRequest(number, plain, params, fields, on_change)
            frame = request.start_message(self.epoch)  # checks that it can be sent at all
            self._next_request += 1
            self._requests[number] = request
            if self._suspects.arrive(number) and self._outbox is not None:
                self._outbox.put(frame)
        return FrontStream(request, self.end)

    def _with_seed(
        self, params: SamplingParams | None, fields: dict[str, Any], number: int
    ) -> tuple[SamplingParams | None, dict[str, Any]]:
        """Fix the seed here: a later engine must draw the same numbers."""
        seed = mix_seed(self._seed, number)
        if params is None:
            return None, fields if fields.get("seed") not in (None, -1) else {
                **fields,
                "seed": seed,
            }
        if fields:
            raise RequestError(f"got both sampling parameters and {sorted(fields)}, expected one")
        if params.seed is None:
            params = SamplingParams(**{**wire.params_fields(params), "seed": seed})
        return params, fields

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **fields: Any
    ) -> FrontStream:
        """Return an iterator of StreamChunk; closing it aborts."""
        return self.open_stream(prompt, params, fields)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, **fields: Any
    ) -> list[RequestOutput]:
        """Return one output a prompt, in order."""
        streams = [self.open_stream(prompt, params, dict(fields)) for prompt in prompts]
        for stream in streams:
            for _ in stream:
                pass
        return [stream.output() for stream in streams]

    def end(self, request: FrontRequest, error: AiosError | None) -> None:
        """End a request from this side: with an error, or with "abort" and what there is."""
        with self._lock:
            if self._requests.pop(request.request_id, None) is None:
                return
            self._send("abort", request.request_id)
            self._clear(request.request_id)
            if error is None:
                request.abort()
            else:
                request.fail(error)

    def probe(self) -> None:
        """Run one token through a step of the engine, for `health`."""
        with self._lock:
            self._send("probe", 0)

    def health(self, stall_s: float = 60.0, probe_s: float = 60.0) -> Health:
        """Return whether it is live and ready; never stalled: what hangs is replaced."""
        alive = self._thread.is_alive() and not self._closing
        if alive and self._outbox is None:
            return Health(True, False, False, "the engine process is starting")
        micros = int(stall_s * 1e6), int(probe_s * 1e6)
        health = judge(
            self._pulse, alive=alive, at_us=now_us(), stall_us=micros[0], probe_us=micros[1]
        )
        return Health(alive, health.ready, False, health.reason)

    def metrics(self) -> MetricsSnapshot:
        """Return the engine's metrics of its last pulse, and how often it was started again.

        Counters and histograms go on over restarts; what an engine counted between its last pulse
        and its death, a tenth of a second at most, is lost.
        """
        restarts = counter("engine_restarts_total", "engine processes lost", max(0, self.epoch - 1))
        with self._lock:
            families = accumulated(self._counted, self._families)
        return MetricsSnapshot((*families, restarts))

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def wait_until_ready(self, timeout_s: float = 600.0) -> None:
        """Wait until an engine process is connected; raise EngineError when none will be."""
        end = time.monotonic() + timeout_s
        while self._outbox is None:
            if self._closing:
                raise EngineClosedError(self._reason)
            if time.monotonic() > end:
                raise EngineError(f"the engine process is not ready after {timeout_s:.0f} s")
            time.sleep(POLL_S / 5)

    def close(self) -> None:
        """End all requests (readers get EngineClosedError) and the process; idempotent."""
        with self._lock:
            self._closing = True
            self._send("close", 0)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> EngineFront:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, kind: str, number: int) -> None:
        if self._outbox is not None:
            self._outbox.put(wire.pack({"kind": kind, "epoch": self.epoch, "request": number}))

    # ---- the reader thread

    def _run(self) -> None:
        try:
            self._serve_epochs()
        finally:  # whatever happens here, nobody waits for a thread that is gone
            self._shut_down()

    def _serve_epochs(self) -> None:
        num_failed = 0
        while not self._closing and num_failed < MAX_FAILED_STARTS:
            self.epoch += 1
            try:
                child = EngineChild(
                    self._command, self._folder, self.epoch, self._start_s, lambda: self._closing
                )
            except (EngineError, OSError) as error:
                num_failed += 1
                self._reason = f"the engine process does not start: {error}"
                continue
            self.child = child
            points = NO_EVIDENCE
            try:
                was_ready = self._serve(child)
                num_failed = 0 if was_ready else num_failed + 1
                points = self._weigh(child) if was_ready else NO_EVIDENCE
            finally:
                with self._lock:
                    self._outbox = None
                child.kill()
            if not self._closing:
                self._note_death(points)

    def _serve(self, child: EngineChild) -> bool:
        """Read messages until the process is gone or hangs; False if it was never ready."""
        self._heard, self._has_given = time.monotonic(), False
        is_ready, end = False, time.monotonic() + self._start_s
        while not self._closing:
            try:
                message = child.connection.receive(POLL_S)
            except TimeoutError:
                if time.monotonic() > end if not is_ready else self._is_silent():
                    return is_ready
                continue
            except AiosError:
                return is_ready  # not our protocol: another process may do better
            if message is None:
                return is_ready
            self._heard = time.monotonic()
            if message["epoch"] != child.epoch:
                continue
            if message["kind"] == "ready":
                is_ready = True
                self._send_all(child)
            elif not self._obeyed(message):
                return is_ready
            if is_ready and self._hangs():
                return True
        return is_ready

    def _send_all(self, child: EngineChild) -> None:
        with self._lock:
            self._pulse = Pulse(None, None)
            self._outbox = child.outbox
            for number, request in self._requests.items():
                if self._suspects.may_run(number):
                    child.outbox.put(request.start_message(child.epoch))

    def _clear(self, number: int) -> None:
        """Let the next suspect run if this one was on trial."""
        following = self._suspects.clear(number)
        if following is not None and self._outbox is not None:
            self._outbox.put(self._requests[following].start_message(self.epoch))

    def _is_silent(self) -> bool:
        """Return whether nothing was heard for too long, as of a process that was stopped."""
        return time.monotonic() - self._heard > self._stall_s

    def _hangs(self) -> bool:
        """Return whether it is silent, or a step runs for too long."""
        if self._is_silent():
            return True
        began = self._pulse.started_us
        return began is not None and now_us() - began > self._stall_s * 1e6

    def _obeyed(self, message: dict[str, Any]) -> bool:
        """Return what `_handle` does, False for fields that are missing or of another kind."""
        try:
            return self._handle(message)
        except (LookupError, TypeError, ValueError, AttributeError):
            return False  # not our protocol either

    def _handle(self, message: dict[str, Any]) -> bool:
        """Apply one message; False if the engine says that it is at its end."""
        kind, number = message["kind"], message["request"]
        with self._lock:
            request = self._requests.get(number)
            if kind == "pulse":
                began, ended = message["ages_us"]
                at_us = now_us()
                self._pulse = Pulse(
                    None if began is None else at_us - began,
                    None if ended is None else at_us - ended,
                )
                self._families = wire.metrics_in(message["metrics"])
            elif kind == "chunks":
                for each, values in message["chunks"]:
                    if each in self._requests:
                        self._has_given = True
                        self._requests[each].put(wire.chunk_in(values))
                        self._clear(each)
            elif request is None:
                return True  # it was aborted meanwhile
            elif kind == "admitted":
                request.admit(message["prompt_token_ids"], message["indices"])
            elif kind == "end":
                self._end(request, message)
            elif kind == "error":
                error = wire.error_in(message["error"])
                if isinstance(error, EngineClosedError):
                    return False  # the engine is at its end; the request is not
                del self._requests[number]
                self._send("abort", number)  # its other completions, if they go on on their own
                request.fail(error)
                self._clear(number)
        return True

    def _end(self, request: FrontRequest, message: dict[str, Any]) -> None:
        self._has_given = True
        chunk = wire.chunk_in(message["chunk"])
        request.end(chunk, message["output"])
        self._clear(request.request_id)
        if not request.has_ended:
            return
        del self._requests[request.request_id]
        total_us = now_us() - request.submitted_us
        self._ends.on_end(now_us(), total_us, chunk.finish_reason or "error")

    def _weigh(self, child: EngineChild) -> int:
        """Return what the end of a process that was ready says against its requests."""
        if self._closing:
            return NO_EVIDENCE
        is_silent, hangs = self._is_silent(), self._hangs()
        return weight(None if hangs else child.wait(), is_silent=is_silent)

    def _note_death(self, points: int) -> None:
        """Find out whether a request is the reason; the others go on in the next process."""
        with self._lock:
            self._counted = accumulated(self._counted, self._families)
            self._families = ()
            gave_or_idle = self._has_given or not self._requests
            guilty = self._suspects.note_death(points, gave_or_idle, self._requests)
            request = None if guilty is None else self._requests.pop(guilty)
        if request is not None:
            request.fail(EngineDiedError("the engine died again and again as it ran this request"))

    def _shut_down(self) -> None:
        with self._lock:
            self._closing = True
            requests, self._requests = list(self._requests.values()), {}
        for request in requests:
            request.fail(EngineClosedError(self._reason, advice="load the model again"))
