"""What the executor of the Triton target asks of a device: memory, copies, launches, graphs.

`torch_device.py` implements it for CUDA and, with recorded graphs, for Triton's interpreter; tests
implement it with a device that watches what a captured graph may not do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Memory = Any  # bytes on the device, at an address that never changes
Bytes = NDArray[np.uint8]


class Graph(Protocol):
    """Captured launches: kernels, grids, scalars and addresses as they were when captured."""

    def replay(self) -> None:
        """Launch all of them again, on what the addresses hold now."""
        ...


class Mark(Protocol):
    """A point between the things that a device is asked for; it can be recorded again."""

    def record(self) -> None:
        """Set the mark behind everything that has been asked for so far."""
        ...

    @property
    def is_passed(self) -> bool:
        """Return whether everything before the mark has run; does not wait."""
        ...

    def wait(self) -> None:
        """Wait until everything before the mark has run, and for nothing else.

        Raises RuntimeError for what failed on the device.
        """
        ...

    def micros_since(self, earlier: Mark) -> float:
        """Return the microseconds between two marks of this device that are passed."""
        ...


class Device(Protocol):
    """A device with its memory. Everything that has been asked for runs in the order asked.

    runs_ahead: what is asked for runs while the host goes on; else before the call returns.
    """

    name: str
    runs_ahead: bool

    @property
    def num_compiled(self) -> int:
        """Return how many kernels were compiled here since the device was opened."""
        ...

    def num_processors(self) -> int | None:
        """Return how many multiprocessors there are; None where programs run one by one."""
        ...

    def memory(self) -> tuple[int, int] | None:
        """Return the (free, total) bytes of a card of its own, None where it is the host's."""
        ...

    def use_binaries(self, artefact: Path) -> None:
        """Take compiled kernels from an artefact's folder rather than compile them."""
        ...

    def allocate(self, num_bytes: int) -> Memory:
        """Return zeroed memory. Raises EngineError when the device has none left."""
        ...

    def host_bytes(self, num_bytes: int) -> Bytes:
        """Return zeroed host memory that `upload` and `download` copy without waiting."""
        ...

    def typed(self, memory: Memory, offset: int, pointer: str) -> Any:
        """Return the elements from a byte offset on, as Triton's pointer type says ("*fp32")."""
        ...

    def write(self, memory: Memory, offset: int, array: NDArray[Any]) -> None:
        """Copy an array to the device and wait for it."""
        ...

    def upload(self, memory: Memory, offset: int, staged: Bytes) -> None:
        """Copy bytes of `host_bytes` to an offset in memory; they may change once it has run."""
        ...

    def download(self, memory: Memory, offset: int, into: Bytes) -> None:
        """Copy bytes from the device into `host_bytes`; they are there once it has run."""
        ...

    def copy(self, memory: Memory, source: int, target: int, num_bytes: int) -> None:
        """Copy within memory; the two ranges do not overlap."""
        ...

    def load(self, path: Path) -> Any:
        """Import a generated kernel module."""
        ...

    def capture(self, run: Callable[[], None]) -> Graph:
        """Return the launches that `run` asks for as a graph. Raises EngineError if `run` waits."""
        ...

    def mark(self) -> Mark:
        """Return a mark; it says nothing before it is recorded."""
        ...

    def flush_cache(self) -> None:
        """Ask for the caches between multiprocessors and memory to be filled with something else.

        Before a measurement: what comes next reads its weights from memory.
        """
        ...

    def synchronize(self) -> None:
        """Wait until everything has run."""
        ...

    def close(self) -> None:
        """Free everything; idempotent."""
        ...
