"""The interpreter as a device that runs ahead of nobody: what it is asked for waits in a queue.

As a GPU does, it runs what was asked for in the order asked, some time between the call and the
end of a wait for it; when, is drawn at random. It watches the host meanwhile: bytes that a copy
reads must be as they were when the copy was asked for, and are worthless afterwards; bytes that a
copy writes are worthless until it has run. A failure is told at the next wait, and at all after it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from aios_compile.runtime.device import Bytes, Graph, Memory
from aios_compile.runtime.torch_device import InterpreterDevice, RecordedGraph

WORTHLESS = 0xA5


class LaggingMark:
    """A mark in the queue. `is_passed` of one that is recorded again is that of the last time."""

    def __init__(self, device: LaggingDevice) -> None:
        self._device = device
        self._asked = self._passed = 0

    def record(self) -> None:
        self._asked += 1
        self._device.ask(partial(self._pass, self._asked))

    def _pass(self, number: int) -> None:
        self._passed = number

    @property
    def is_passed(self) -> bool:
        return self._passed == self._asked

    def wait(self) -> None:
        self._device.run_until(lambda: self.is_passed)

    def micros_since(self, earlier: Any) -> float:
        assert self.is_passed and earlier.is_passed, "a time of what has not run"
        return 1.0


class LaggingGraph:
    def __init__(self, graph: Graph, device: LaggingDevice) -> None:
        self._graph, self._device = graph, device

    def replay(self) -> None:
        self._device.ask(self._graph.replay)


class LaggingDevice(InterpreterDevice):
    """See the module. eagerness: how likely one more thing has run when the next is asked for."""

    runs_ahead = True

    def __init__(self, seed: int = 0, eagerness: float = 0.4) -> None:
        super().__init__()
        self.random, self.eagerness = random.Random(seed), eagerness
        self.queue: deque[Callable[[], None]] = deque()
        self.error: Exception | None = None
        self.most_asked = 0

    def ask(self, thing: Callable[[], None]) -> None:
        self.queue.append(thing)
        self.most_asked = max(self.most_asked, len(self.queue))
        while self.queue and self.random.random() < self.eagerness:
            self._run_one()

    def _run_one(self) -> None:
        thing = self.queue.popleft()
        try:
            if self.error is None:
                thing()
        except Exception as error:  # noqa: BLE001 - for whoever waits
            self.error = error

    def run_until(self, is_done: Callable[[], bool]) -> None:
        while self.queue and not is_done():
            self._run_one()
        if self.error is not None:
            raise RuntimeError(f"the device failed: {self.error}") from self.error

    def synchronize(self) -> None:
        self.run_until(lambda: False)

    def mark(self) -> Any:
        return LaggingMark(self)

    def upload(self, memory: Memory, offset: int, staged: Bytes) -> None:
        asked, plain = staged.copy(), super().upload

        def run() -> None:
            assert np.array_equal(staged, asked), "host bytes changed before they were copied"
            plain(memory, offset, staged)
            staged[:] = WORTHLESS

        self.ask(run)

    def download(self, memory: Memory, offset: int, into: Bytes) -> None:
        plain = super().download
        into[:] = WORTHLESS

        def run() -> None:
            assert (into == WORTHLESS).all(), "host bytes have another owner before they arrive"
            plain(memory, offset, into)

        self.ask(run)

    def copy(self, memory: Memory, source: int, target: int, num_bytes: int) -> None:
        self.ask(partial(super().copy, memory, source, target, num_bytes))

    def write(self, memory: Memory, offset: int, array: Any) -> None:
        self.synchronize()
        super().write(memory, offset, array)

    def launch(self, kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
        if self.graph is not None:
            super().launch(kernel, grid, arguments, options)
        else:
            self.ask(partial(super().launch, kernel, grid, arguments, options))

    def capture(self, run: Callable[[], None]) -> Graph:
        graph = super().capture(run)
        assert isinstance(graph, RecordedGraph)
        return LaggingGraph(graph, self)
