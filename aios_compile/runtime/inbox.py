"""What callers' threads leave for the engine's thread: requests, aborts, orders.

Callers take a lock and return at once; the engine's thread looks between two steps, without a lock
when there is nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from aios_compile.errors import EngineClosedError, QueueFullError
from aios_compile.runtime.health import now_us
from aios_compile.runtime.request import Request


class Commands(NamedTuple):
    """Everything since the last look. held_back: pages to do without, None as before."""

    arrived: list[Request]
    aborted: list[Request]
    held_back: int | None
    closing: bool


class Inbox:
    """Numbers requests and hands them over. All methods but those marked may be called anywhere.

    seed: requests without a seed get one from this and their number. retry_after_s: seconds after
    which a queue of so many is expected to have room.
    """

    def __init__(self, seed: int, retry_after_s: Callable[[int], int]) -> None:
        self.requests: dict[int, Request] = {}  # added by submit, removed by the engine's thread
        self.is_closing = False  # written under _wake
        # [1], not 0 when there is news: steps that are begun ahead look at it, on their device
        self.hold = np.zeros(1, np.int32)
        self._seed = seed
        self._retry_after_s = retry_after_s
        # reentrant: the garbage collector may drop (abort) a stream anywhere
        self._wake = threading.Condition()
        self._arrived: list[Request] = []  # guarded by _wake, as is all below
        self._aborted: deque[Request] = deque()
        self._held_back: int | None = None
        self._close_reason = "the model was closed"
        self._next_request = 0
        self._next_sequence = 0
        self._num_begun = 0  # requests that left the queue; written by the engine's thread alone

    @property
    def num_waiting(self) -> int:
        """Requests that have not had their first step; may be a step old."""
        return max(0, self._next_request - self._num_begun)

    @property
    def has_news(self) -> bool:
        """Return whether `take` would return something; takes no lock."""
        held_back = self._held_back is not None
        return bool(self._arrived or self._aborted) or self.is_closing or held_back

    def check_queue(self, num_requests: int, max_waiting: int) -> None:
        """Raise QueueFullError if so many more requests would not fit the queue."""
        waiting = self.num_waiting
        if waiting + num_requests > max_waiting:
            raise QueueFullError(
                f"{waiting} requests wait, expected at most {max_waiting - num_requests}",
                retry_after_s=self._retry_after_s(waiting),
            )

    def submit(self, requests: list[Request], max_waiting: int | None = None) -> None:
        """Queue admitted requests, all or none.

        Raises EngineClosedError after the end, QueueFullError beyond `max_waiting` in the queue.
        """
        with self._wake:
            if self.is_closing:
                raise EngineClosedError(self._close_reason, advice="load the model again")
            if max_waiting is not None:
                self.check_queue(len(requests), max_waiting)
            at_us = now_us()
            for request in requests:
                request.number(self._next_request, self._next_sequence, self._seed, at_us)
                self._next_request += 1
                self._next_sequence += len(request.sequences)
                self.requests[request.request_id] = request
            self._arrived += requests
            self.hold[0] = 1
            self._wake.notify()

    def abort(self, requests: list[Request]) -> None:
        """End requests with "abort"; those that have ended already stay as they are."""
        with self._wake:
            self._aborted.extend(requests)
            self.hold[0] = 1
            self._wake.notify()

    def hold_back(self, num_pages: int) -> None:
        """Let the scheduler do without so many pages from the next step on."""
        with self._wake:
            self._held_back = num_pages
            self.hold[0] = 1
            self._wake.notify()

    def request_close(self, reason: str | None = None) -> None:
        """Take nothing more; the thread ends everything after the step that runs."""
        with self._wake:
            self.is_closing = True
            self._close_reason = reason or self._close_reason
            self.hold[0] = 1
            self._wake.notify()

    # ---- the engine thread

    def take(self, *, may_wait: bool) -> Commands:
        """Return what has come; sleep until something has if `may_wait`."""
        with self._wake:
            while may_wait and not self.has_news:
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            aborted, self._aborted = list(self._aborted), deque()
            held_back, self._held_back = self._held_back, None
            self.hold[0] = 0
            return Commands(arrived, aborted, held_back, self.is_closing)

    def left_queue(self) -> None:
        """Count a request that had its first step, or ended without one."""
        self._num_begun += 1

    def shut(self, reason: str | None) -> str:
        """Close for good; return the reason that requests which are left end with."""
        self.request_close(reason)
        with self._wake:
            self._arrived.clear()
            return self._close_reason
