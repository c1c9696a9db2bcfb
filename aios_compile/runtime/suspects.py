"""Which request kills engines: after processes that died without a token, one at a time is tried.

A request that brings down every engine that runs it must not take the others along. When processes
died in a row before anybody got a token, all requests are suspects. The oldest is sent alone (with
those that are cleared); a token for it clears it, and the next one follows; if processes die under
it again and again, it is the one.

How a process ended says how much it tells. A crash, an exit or a step that hangs is the process's
own doing: two of them are enough. A kill from outside (an operator, the kernel short of memory) or
a process that was stopped may be chance, and on a loaded machine the first token takes long enough
for several in a row to come before it: six are needed. Who died before it was ready ran no request.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable

OWN_DOING, FROM_OUTSIDE, NO_EVIDENCE = 3, 1, 0
ENOUGH = 6  # points in a row: two deaths by its own doing, six from outside
OUTSIDE_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def weight(returncode: int | None, *, is_silent: bool) -> int:
    """Return the points of a death against the requests of a process that had been ready.

    returncode: as of subprocess, None if it had not ended when we killed it: a step hung, or
    (is_silent) nothing was heard, as of a process that was stopped.
    """
    by_signal = returncode is not None and -returncode in OUTSIDE_SIGNALS
    return FROM_OUTSIDE if is_silent or by_signal else OWN_DOING


class Suspects:
    """Ids of suspected requests. Plain data; the front holds its lock around every call."""

    def __init__(self) -> None:
        self._waiting: list[int] = []  # the first one is on trial
        self._barren = 0  # points of deaths without a token for anybody
        self._trial = 0  # points against the one on trial

    @property
    def on_trial(self) -> int | None:
        return self._waiting[0] if self._waiting else None

    def may_run(self, number: int) -> bool:
        """Return whether a request may be sent now: it is cleared, or it is on trial."""
        return number not in self._waiting or number == self.on_trial

    def arrive(self, number: int) -> bool:
        """Note a new request; return whether it may be sent now."""
        if self._waiting:
            self._waiting.append(number)
            return False
        return True

    def clear(self, number: int) -> int | None:
        """Note that a request got a token or ended; return the request to be tried next."""
        if number not in self._waiting:
            return None
        was_on_trial = number == self.on_trial
        self._waiting.remove(number)
        self._trial *= not was_on_trial
        return self.on_trial if was_on_trial else None

    def note_death(self, points: int, gave_tokens: bool, requests: Iterable[int]) -> int | None:
        """Take in the end of a process; return the request that was found guilty.

        points: of `weight`.
        """
        if self._waiting:
            self._trial += points
            if self._trial < ENOUGH:
                return None
            self._trial = 0
            return self._waiting.pop(0)
        self._barren = 0 if gave_tokens else self._barren + points
        if self._barren >= ENOUGH:
            self._waiting, self._barren = sorted(requests), 0
        return None
