"""Whether the engine lives, and whether it is ready: two questions (reliability rule 6).

Live: its thread runs, it was not closed, and no step has been running for too long. Ready: live,
and a step finished lately; when idle that is a probe's, so a dead engine never looks healthy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Pulse:
    """When steps began and ended, in microseconds. Written by the engine's thread alone."""

    started_us: int | None = None  # of the step that runs now
    finished_us: int | None = None  # of the last one that finished without an error

    def begin(self) -> None:
        self.started_us = now_us()

    def end(self, passed: bool) -> None:
        if passed:
            self.finished_us = now_us()
        self.started_us = None


@dataclass(frozen=True)
class Health:
    """The two answers, and why one of them is no. `stalled`: a step is running for too long."""

    live: bool
    ready: bool
    stalled: bool
    reason: str


def judge(pulse: Pulse, *, alive: bool, at_us: int, stall_us: int, probe_us: int) -> Health:
    """Return the health at a moment. Pure.

    alive: the thread runs and nobody closed it. stall_us: the longest that a step may take.
    probe_us: how often an idle engine is probed.
    """
    if not alive:
        return Health(False, False, False, "the engine was closed or its thread ended")
    started, finished = pulse.started_us, pulse.finished_us
    if started is not None and at_us - started > stall_us:
        reason = f"a step has been running for {(at_us - started) / 1e6:.1f} s"
        return Health(False, False, True, reason)
    if finished is None:
        return Health(True, False, False, "no step has finished yet")
    age_us = at_us - finished
    if age_us > stall_us + probe_us:
        return Health(True, False, False, f"no step has finished for {age_us / 1e6:.1f} s")
    return Health(True, True, False, "")


def now_us() -> int:
    """Return microseconds of the monotonic clock that every time in the runtime is read from."""
    return time.perf_counter_ns() // 1000
