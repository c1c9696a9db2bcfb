"""The engine for asyncio: streams, a bounded queue, draining, a watchdog, metrics.

The steps run in the engine's own thread. The event loop never waits for that thread, and that
thread never waits for the loop.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from aios_compile.errors import (
    EngineClosedError,
    EngineDrainingError,
    EngineError,
    EngineStalledError,
)
from aios_compile.runtime.admission import Prompt
from aios_compile.runtime.async_stream import AsyncStream, LoopWaker, OpenStream
from aios_compile.runtime.health import Health
from aios_compile.runtime.metrics import MetricsSnapshot
from aios_compile.runtime.outputs import RequestOutput
from aios_compile.sampling_params import SamplingParams

DEFAULT_MAX_WAITING = 512  # requests without a step; beyond that a client is better told at once
DEFAULT_STALL_S = 60.0
DRAIN_POLL_S = 0.005


class Backend(Protocol):
    """An engine that runs elsewhere: in a thread (runtime.engine.Engine) or in a process."""

    def open_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        fields: dict[str, Any],
        *,
        on_change: Callable[[], None] | None = None,
        max_waiting: int | None = None,
    ) -> OpenStream:
        """Submit a request; on_change is called, in another thread, when it has news.

        Raises RequestError, QueueFullError with max_waiting requests before it, EngineError.
        """

    def probe(self) -> None:
        """Have an idle engine run a token, to prove that it works; returns at once."""

    def health(self, stall_s: float, probe_s: float) -> Health:
        """Return whether the engine works; a step longer than stall_s seconds counts as hung."""

    def metrics(self) -> MetricsSnapshot:
        """Return counters, gauges and histograms since the start."""

    def close(self) -> None:
        """Abort what runs and free everything; idempotent."""


class AsyncEngine:
    """Owner of a CompiledModel (or of its engine), for the tasks of one event loop.

    max_waiting: requests that may wait for their first step; more raise QueueFullError, which says
    after how many seconds to come again. stall_s: a step that runs longer counts as hung: readers
    get EngineStalledError, and nothing new is taken until it returns. probe_s: how often an idle
    engine runs a token to prove that it works.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_waiting: int = DEFAULT_MAX_WAITING,
        stall_s: float = DEFAULT_STALL_S,
        probe_s: float = 30.0,
    ) -> None:
        self.model = model
        self.max_waiting = max_waiting
        self.stall_s = stall_s
        self.probe_s = probe_s
        self._backend: Backend = getattr(model, "engine", model)
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waker: LoopWaker | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._is_draining = False

    @classmethod
    async def load(cls, model: Any, *, in_process: bool = True, **options: Any) -> AsyncEngine:
        """Return an engine for a folder or hub id; options are those of load_and_compile too.

        in_process False: the engine runs in a process of its own, which is started again when it
        dies or hangs, and no request loses a token (runtime/engine_front.py). Needs a Unix.
        """
        own: dict[str, Any] = {
            k: options.pop(k) for k in ("max_waiting", "stall_s", "probe_s") if k in options
        }
        engine = cls(await asyncio.to_thread(_load, model, in_process, own, options), **own)
        await engine.start()
        return engine

    async def start(self) -> None:
        """Start the watchdog in this loop; idempotent, and done by the first request too."""
        self._bind()

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **fields: Any
    ) -> AsyncStream:
        """Return an async iterator of StreamChunk for one prompt (text or token ids).

        params, or the fields of SamplingParams as keywords over the model's defaults. Nothing
        happens before its first `__anext__` or `submit`; see AsyncStream for errors and the end.
        """
        waker = self._bind()

        def opener(notify: Callable[[], None]) -> OpenStream:
            self._check_open()
            return self._backend.open_stream(
                prompt, params, fields, on_change=notify, max_waiting=self.max_waiting
            )

        size = len(prompt) if isinstance(prompt, str) else 0
        return AsyncStream(opener, waker, size, self._streams.add)

    async def result(
        self, prompt: Prompt, params: SamplingParams | None = None, **fields: Any
    ) -> RequestOutput:
        """Return the whole result of one prompt."""
        return await self.generate(prompt, params, **fields).result()

    def abort(self, request_id: int) -> bool:
        """End a request with finish_reason "abort"; False if it is not running."""
        for stream in list(self._streams):
            if stream.request_id == request_id and not stream.is_ended:
                stream.stop()
                return True
        return False

    @property
    def num_open(self) -> int:
        """Streams that were submitted and not read to their end."""
        return sum(not stream.is_ended for stream in self._streams)

    def health(self) -> Health:
        """Return whether the engine is live and ready, and why not."""
        health = self._backend.health(self.stall_s, self.probe_s)
        if self._is_draining and health.live:  # that comes first, whatever it waits for besides
            return Health(True, False, False, "the engine is draining")
        return health

    def metrics(self) -> MetricsSnapshot:
        """Return counters, gauges and histograms; `.prometheus_text()` for an exporter."""
        return self._backend.metrics()

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take nothing new and wait until every stream was read to its end.

        Returns False if that took longer than timeout_s; what is left then goes on.
        """
        self._is_draining = True
        loop = asyncio.get_running_loop()
        end = None if timeout_s is None else loop.time() + timeout_s
        while self.num_open:
            if end is not None and loop.time() >= end:
                return False
            await asyncio.sleep(DRAIN_POLL_S)
        return True

    async def close(self) -> None:
        """Abort what runs, then free everything; idempotent."""
        self._is_draining = True
        if self._watch_task is not None:
            self._watch_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch_task
        for stream in list(self._streams):
            stream.fail(EngineClosedError("the engine was closed"))
        await asyncio.to_thread(self.model.close)

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _bind(self) -> LoopWaker:
        loop = asyncio.get_running_loop()
        if self._waker is None:
            self._loop, self._waker = loop, LoopWaker(loop)
            self._watch_task = loop.create_task(_watch(weakref.ref(self)))
        if loop is not self._loop:
            raise EngineError(
                "the engine belongs to another event loop", advice="one AsyncEngine for each loop"
            )
        return self._waker

    def _check_open(self) -> None:
        if self._is_draining:
            raise EngineDrainingError("the engine is draining: it takes no new requests")
        health = self._backend.health(self.stall_s, self.probe_s)
        if health.stalled:
            raise EngineStalledError(health.reason)

    def _look_after(self) -> None:
        """Fail the readers of a hung step; keep an idle engine's readiness true."""
        health = self._backend.health(self.stall_s, self.probe_s / 2)
        if health.stalled:
            for stream in list(self._streams):
                stream.fail(EngineStalledError(health.reason))
        elif health.live and not health.ready:
            self._backend.probe()


def _load(model: Any, in_process: bool, own: dict[str, Any], options: dict[str, Any]) -> Any:
    if in_process:
        from aios_compile.api import load_and_compile

        return load_and_compile(model, **options)
    from aios_compile.engine_process import start_front

    front = start_front(model, stall_s=own.get("stall_s", DEFAULT_STALL_S), **options)
    try:
        front.wait_until_ready()
    except BaseException:
        front.close()
        raise
    return front


async def _watch(held: weakref.ref[AsyncEngine]) -> None:
    """Look after the engine until it is closed or gone."""
    while True:
        engine = held()
        if engine is None:
            return
        with suppress(EngineError):  # it was closed meanwhile
            engine._look_after()
        pause = min(engine.stall_s, engine.probe_s) / 4
        del engine
        await asyncio.sleep(pause)
