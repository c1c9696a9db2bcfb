"""From the engine's thread to an event loop: news, and the stream that waits for them.

engine thread: put -> notify -> (at most one wake-up a loop is under way)
event loop:    deliver -> Event.set of each stream that has news -> __anext__ takes one chunk
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from aios_compile.runtime.outputs import RequestOutput, StreamChunk

# Tokenising this much text takes a few milliseconds; more is done outside the event loop.
MAX_INLINE_CHARACTERS = 16_384


class OpenStream(Protocol):
    """A submitted request: `runtime.engine.TextStream`, or that of an engine elsewhere."""

    @property
    def request_id(self) -> int: ...

    @property
    def is_over(self) -> bool: ...

    def is_admitted(self) -> bool: ...

    def take_nowait(self) -> StreamChunk | None: ...

    def fail(self, error: Exception) -> None: ...

    def close(self) -> None: ...

    def output(self) -> RequestOutput: ...


class LoopWaker:
    """Sets events of one loop from any thread; wake-ups that are under way are shared."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready: deque[asyncio.Event] = deque()
        self._is_under_way = False

    def notify(self, event: asyncio.Event) -> None:
        self._ready.append(event)
        if self._is_under_way:
            return  # `_deliver` clears the flag before it looks: it will see this event
        self._is_under_way = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            self._ready.clear()  # the loop was closed: nobody waits any more

    def _deliver(self) -> None:
        self._is_under_way = False
        while self._ready:
            self._ready.popleft().set()


Opener = Callable[[Callable[[], None]], OpenStream]


class AsyncStream:
    """Async iterator over the chunks of one request, `chunk.index` of n; one task reads it.

    The request is submitted by the first `__anext__`, or before by `submit`, which is where a
    refusal is raised. Cancelling the task that waits, `aclose`, or dropping the stream aborts it.
    """

    def __init__(
        self,
        opener: Opener,
        waker: LoopWaker,
        num_characters: int,
        on_open: Callable[[AsyncStream], Any],
    ) -> None:
        self._opener = opener
        self._waker = waker
        self._num_characters = num_characters
        self._on_open = on_open
        self._changed = asyncio.Event()
        self._open: OpenStream | None = None
        self.is_ended = False

    @property
    def request_id(self) -> int:
        """The request's number; -1 before it is submitted."""
        return -1 if self._open is None else self._open.request_id

    async def submit(self) -> None:
        """Check the request and queue it; idempotent.

        Raises RequestError, QueueFullError (with a hint when to come again), EngineClosedError.
        """
        if self._open is not None or self.is_ended:
            return
        changed, waker = self._changed, self._waker

        def notify() -> None:
            waker.notify(changed)  # holds no reference to the stream: dropping it aborts it

        if self._num_characters <= MAX_INLINE_CHARACTERS:
            self._open = self._opener(notify)
        else:
            work = asyncio.ensure_future(asyncio.to_thread(self._opener, notify))
            try:
                self._open = await asyncio.shield(work)
            except asyncio.CancelledError:
                work.add_done_callback(_close_result)  # the thread cannot be stopped
                raise
        self._on_open(self)
        try:
            while not self._open.is_admitted():
                self._changed.clear()
                if not self._open.is_admitted():
                    await self._changed.wait()
        except BaseException:
            self.abort()
            raise

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> StreamChunk:
        if self.is_ended:
            raise StopAsyncIteration
        try:
            await self.submit()
            assert self._open is not None
            while True:
                self._changed.clear()
                chunk = self._open.take_nowait()
                if chunk is not None:
                    break
                await self._changed.wait()
        except BaseException:
            self.abort()
            raise
        self.is_ended = self._open.is_over
        return chunk

    async def result(self) -> RequestOutput:
        """Read to the end and return the whole result."""
        async for _ in self:
            pass
        return self.output()

    def output(self) -> RequestOutput:
        """Return the whole result; only after the last chunk."""
        assert self._open is not None and self.is_ended, "the stream has not ended"
        return self._open.output()

    def fail(self, error: Exception) -> None:
        """End it with an error, for its reader."""
        if self._open is not None and not self.is_ended:
            self._open.fail(error)

    def stop(self) -> None:
        """End it now; its reader gets what there is, with finish_reason "abort"."""
        if self._open is not None and not self.is_ended:
            self._open.close()

    def abort(self) -> None:
        """End the request now; its pages are free after the step that runs. Idempotent."""
        if not self.is_ended:
            self.is_ended = True
            if self._open is not None:
                self._open.close()

    async def aclose(self) -> None:
        """Do what `abort` does: the protocol of asynchronous generators."""
        self.abort()

    def __del__(self) -> None:
        self.abort()


def _close_result(work: asyncio.Future[OpenStream]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().close()
