"""Which request kills engines: after processes that died without a token, one at a time is tried.

A request that brings down every engine that runs it must not take the others along. When two
processes in a row died before anybody got a token, all requests are suspects. The oldest is sent
alone (with those that are cleared); a token for it clears it, and the next one follows; if two
processes die under it, it is the one.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_BARREN_DEATHS = 2  # in a row, without a token for anybody
MAX_TRIAL_DEATHS = 2


class Suspects:
    """Ids of suspected requests. Plain data; the front holds its lock around every call."""

    def __init__(self) -> None:
        self._waiting: list[int] = []  # the first one is on trial
        self._num_barren = 0
        self._num_trial = 0

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
        self._num_trial *= not was_on_trial
        return self.on_trial if was_on_trial else None

    def note_death(self, gave_tokens: bool, requests: Iterable[int]) -> int | None:
        """Take in the end of a process; return the request that was found guilty."""
        if self._waiting:
            self._num_trial += 1
            if self._num_trial < MAX_TRIAL_DEATHS:
                return None
            self._num_trial = 0
            return self._waiting.pop(0)
        self._num_barren = 0 if gave_tokens else self._num_barren + 1
        if self._num_barren >= MAX_BARREN_DEATHS:
            self._waiting, self._num_barren = sorted(requests), 0
        return None
