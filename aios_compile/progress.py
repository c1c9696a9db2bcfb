"""Stages of a start with their seconds: shown on stderr while they run, added up afterwards.

Time in a stage inside another stage counts for the inner one only. So the stages, plus the time
that no stage accounts for, always add up to the total.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

_TICK_SECONDS = 0.1


@dataclass
class _Stage:
    name: str
    started: float
    inner: float = 0.0
    done: int = 0
    total: int = 0

    def label(self) -> str:
        return f"{self.name} {self.done}/{self.total}" if self.total else self.name


@dataclass(frozen=True)
class Summary:
    """Seconds of each stage, of no stage, and of all; `seconds` plus `unaccounted` is `total`."""

    seconds: dict[str, float]
    unaccounted: float
    total: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(map(len, (*self.seconds, "unaccounted")))
        rows = (*self.seconds.items(), ("unaccounted", self.unaccounted), ("total", self.total))
        return "\n".join(f"  {name:<{width}} {seconds:9.3f} s" for name, seconds in rows)


@dataclass
class Progress:
    """Record stages, and show them on `stream` if `show`. One thread opens stages; any may update.

    On a terminal the running stage is one line that is rewritten; elsewhere each finished stage is
    a line. `started` (time.perf_counter) lets a caller count from before the object was made.
    """

    show: bool = True
    stream: TextIO | None = None
    started: float = field(default_factory=time.perf_counter)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _stack: list[_Stage] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _ended: float | None = None

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[None]:
        """Time the body as stage `name`; `total` units of work if they can be counted."""
        stage = _Stage(name, time.perf_counter(), total=total)
        with self._lock:
            self.seconds.setdefault(name, 0.0)
            self._stack.append(stage)
            self._draw()
        stop = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(stop,), daemon=True)
        if self._live():
            ticker.start()
        try:
            yield
        finally:
            stop.set()
            if ticker.ident is not None:
                ticker.join()
            self._close(stage)

    def _close(self, stage: _Stage) -> None:
        elapsed = time.perf_counter() - stage.started
        with self._lock:
            top = self._stack.pop()
            assert top is stage, f"stage {stage.name} ended inside {top.name}"
            self.seconds[stage.name] += elapsed - stage.inner
            if self._stack:
                self._stack[-1].inner += elapsed
            self._line(f"{stage.label():<24} {elapsed:8.2f} s")

    def update(self, done: int, total: int | None = None) -> None:
        """Say that `done` of `total` units of the running stage are finished."""
        with self._lock:
            if self._stack:
                self._stack[-1].done = done
                self._stack[-1].total = total if total is not None else self._stack[-1].total
                self._draw()

    def note(self, text: str) -> None:
        """Record one line for the user (a cache hit, the reason for a miss) and show it."""
        with self._lock:
            self.notes.append(text)
            self._line(text)

    def finish(self) -> None:
        """Stop the clock of the total; later summaries stay as they are."""
        self._ended = self._ended or time.perf_counter()

    def summary(self) -> Summary:
        """Return the seconds so far, or up to `finish`."""
        total = (self._ended or time.perf_counter()) - self.started
        seconds = dict(self.seconds)
        return Summary(seconds, total - sum(seconds.values()), total, tuple(self.notes))

    def _out(self) -> TextIO:
        return self.stream if self.stream is not None else sys.stderr

    def _live(self) -> bool:
        return self.show and self._out().isatty() and os.environ.get("TERM") != "dumb"

    def _tick(self, stop: threading.Event) -> None:
        while not stop.wait(_TICK_SECONDS):
            # Never wait for the lock: a stage that ends joins this thread.
            if self._lock.acquire(blocking=False):
                try:
                    self._draw()
                finally:
                    self._lock.release()

    def _draw(self) -> None:
        if self._live() and self._stack:
            stage = self._stack[-1]
            elapsed = time.perf_counter() - stage.started
            self._write(f"\r\x1b[2K{stage.label():<24} {elapsed:8.1f} s")

    def _line(self, text: str) -> None:
        if self.show:
            self._write(f"\r\x1b[2K{text}\n" if self._live() else f"{text}\n")

    def _write(self, text: str) -> None:
        out = self._out()
        out.write(text)
        out.flush()
