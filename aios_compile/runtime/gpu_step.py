"""A step that a device was asked for, and its result.

    host     | fill side 0, ask | fill side 1, ask      | wait 0, commit, fill side 0, ask | ...
    device   |                  | copy, graph n, copy   | copy, graph n + 1, copy          | ...

A step is four things asked for in order: the packet's copy, the graph, the results' copy, a mark.
Nothing holds it back once it was asked for. Whoever waits, waits for the mark alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from aios_compile.codegen.step_results import LAZY
from aios_compile.errors import EngineError
from aios_compile.runtime.batch import NO_LOGITS, Floats, StepResult
from aios_compile.runtime.device import Mark

Found = Mapping[str, NDArray[Any]]


@dataclass
class StepSide:
    """One of the two that take turns: its marks, and the step that used it last.

    index: which of the host's buffers are its own. waited_us: how long the host has waited for its
    steps, all together.
    """

    index: int
    first: Mark
    last: Mark
    step: GpuStep | None = None
    waited_us: float = 0.0

    @property
    def is_over(self) -> bool:
        """Return whether nobody waits for a step of this side any more."""
        return self.step is None or self.step.is_over

    def settle(self) -> None:
        """Wait for the end of the step; its error is for those who wait for its result."""
        if self.step is not None:
            with suppress(EngineError):
                self.step.finish()


class GpuStep:
    """A step that was begun. See runtime.batch.BegunStep.

    number: of the step since the executor was made. views: gives the results once they are there.
    fail: told of an error of the device, and gives the one to raise.
    """

    def __init__(
        self,
        number: int,
        side: StepSide,
        views: Callable[[], Found],
        fail: Callable[[int, Exception], EngineError],
    ) -> None:
        self.number, self.is_over, self.micros = number, False, 0.0
        self._side, self._views, self._fail = side, views, fail
        self._error: EngineError | None = None

    def leave_out(self) -> bool:
        """Return False: what the device was asked for runs."""
        return False

    def make_sure(self) -> bool:
        """Return True: what the device was asked for runs."""
        return True

    @property
    def has_ended(self) -> bool:
        """Return whether its results are there; does not wait."""
        return self.is_over or self._side.last.is_passed

    def finish(self) -> Found:
        """Wait for its end; return its results without the logits, valid until the next but one.

        Raises EngineError, each time, if the device failed.
        """
        if not self.is_over:
            self.is_over = True
            begin = time.perf_counter()
            try:
                self._side.last.wait()
                self._side.waited_us += (time.perf_counter() - begin) * 1e6
                self.micros = self._side.last.micros_since(self._side.first)
            except Exception as error:  # noqa: BLE001 - a device raises what it likes
                self._error = self._fail(self.number, error)
                self._error.__cause__ = error
        if self._error is not None:
            raise self._error
        return self._views()

    def wait(self) -> StepResult:
        """Wait for its end; the result has no logits, which the next step may have overwritten."""
        return StepResult(**self.finish(), logits=NO_LOGITS)


class LazyResult(StepResult):
    """A result whose logits are copied from the device when somebody looks at them."""

    def __init__(self, read: Callable[[], Floats], found: Found) -> None:
        self._read = read
        vars(self).update(found)

    def __getattr__(self, name: str) -> Any:
        if name != LAZY:
            raise AttributeError(name)
        self.logits = self._read()
        return self.logits
