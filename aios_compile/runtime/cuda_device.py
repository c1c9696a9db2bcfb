"""A GPU as the device of the Triton target: CUDA, or ROCm by the same names.

torch is imported when a device is made, not before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from aios_compile.codegen.triton import binary_cache
from aios_compile.codegen.triton.binary_cache import Compilations
from aios_compile.errors import EngineError
from aios_compile.runtime.device import Bytes, Graph, Mark, Memory
from aios_compile.runtime.torch_device import TorchDevice, launched_by

SCRATCH_BYTES = 1 << 20  # 128 for each descriptor of each program: more than any kernel takes


class EventMark:
    """A CUDA event. stream: torch's, of the device; the current one may be another thread's."""

    def __init__(self, stream: Any) -> None:
        import torch

        make: Any = torch.cuda.Event  # has no types
        self._stream, self.event = stream, make(enable_timing=True)

    def record(self) -> None:
        self.event.record(self._stream)

    @property
    def is_passed(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def micros_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, EventMark), "marks of one device"
        return float(earlier.event.elapsed_time(self.event)) * 1e3


class CudaDevice(TorchDevice):
    """A GPU. Host memory is pinned; graphs share one pool of memory and one stream to capture on.

    What torch calls current (device, stream) is a thread's own, and the engine's thread is not the
    one that opens the device: so whatever is asked for here is asked under `here`, kernels that are
    launched through a loaded module too. Nobody's current device is changed.
    """

    runs_ahead = True

    def __init__(self, name: str) -> None:
        super().__init__(name if ":" in name else "cuda:0")
        cuda = self.torch.cuda
        self._index = int(self.name.partition(":")[2])
        self._stream = cuda.default_stream(self.name)
        # torch's own stream for captures is of the device that was current at the first capture.
        self._captures: Any = cuda.Stream(self.name)
        with self.here():
            self._pool = cuda.graph_pool_handle()
            self._scratch = self.allocate(SCRATCH_BYTES)
        self._compilations = Compilations()
        self._flushed: Memory | None = None
        self._thread = threading.local()

    def here(self) -> AbstractContextManager[object]:
        """Return what makes the device and its stream the thread's current ones meanwhile."""
        cuda = self.torch.cuda
        if cuda.current_device() == self._index and cuda.current_stream() == self._stream:
            return nullcontext()  # mostly; what torch has for the other case takes longer
        found: AbstractContextManager[object] = cuda.stream(self._stream)
        return found

    def _set_scratch(self) -> None:
        """Give tensor descriptors a fixed place: kernels run one behind the other.

        Triton keeps this for the thread alone that says it, so each thread that launches says it.
        """
        if getattr(self._thread, "has_scratch", False):
            return
        import triton

        def take(size: int, alignment: int, stream: int | None) -> Any:
            if size > SCRATCH_BYTES:
                raise EngineError(f"a kernel's tensor descriptors take {size} bytes")
            return self._scratch

        triton.set_allocator(take)
        self._thread.has_scratch = True

    @property
    def num_compiled(self) -> int:
        return len(self._compilations.names)

    def num_processors(self) -> int:
        """Return how many multiprocessors the card has."""
        return int(self.torch.cuda.get_device_properties(self.name).multi_processor_count)

    def use_binaries(self, artefact: Path) -> None:
        binary_cache.use(artefact)

    def host_bytes(self, num_bytes: int) -> Bytes:
        with self.here():
            pinned: Bytes = self.torch.zeros(
                max(num_bytes, 1), dtype=self.torch.uint8, pin_memory=True
            ).numpy()
        return pinned

    def upload(self, memory: Memory, offset: int, staged: Bytes) -> None:
        with self.here():
            super().upload(memory, offset, staged)

    def download(self, memory: Memory, offset: int, into: Bytes) -> None:
        with self.here():
            super().download(memory, offset, into)

    def write(self, memory: Memory, offset: int, array: NDArray[Any]) -> None:
        with self.here():
            super().write(memory, offset, array)

    def copy(self, memory: Memory, source: int, target: int, num_bytes: int) -> None:
        with self.here():
            super().copy(memory, source, target, num_bytes)

    def load(self, path: Path) -> Any:
        return launched_by(self, super().load(path))

    def launch(self, kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
        """Launch a kernel on this device, or into the graph that this thread captures."""
        self._set_scratch()
        if self.torch.cuda.is_current_stream_capturing():  # `capture` has said which stream
            kernel[grid](*arguments, **options)
            return
        with self.here():
            kernel[grid](*arguments, **options)

    def capture(self, run: Callable[[], None]) -> Graph:
        graph = self.torch.cuda.CUDAGraph()
        # Another thread's use of the GPU, or another model's, is neither captured nor forbidden.
        capture = self.torch.cuda.graph(
            graph, pool=self._pool, stream=self._captures, capture_error_mode="thread_local"
        )
        try:
            with self.torch.cuda.device(self.name), capture:
                run()
        except RuntimeError as error:
            raise EngineError(f"a step cannot be captured as a CUDA graph: {error}") from error
        return CudaGraph(graph, self)

    def memory(self) -> tuple[int, int]:
        """Return the (free, total) bytes of the card."""
        free, total = self.torch.cuda.mem_get_info(self.name)
        return int(free), int(total)

    def mark(self) -> Mark:
        with self.here():
            return EventMark(self._stream)

    def flush_cache(self) -> None:
        """Write twice the second-level cache."""
        if self._flushed is None:
            cache = self.torch.cuda.get_device_properties(self.name).L2_cache_size
            self._flushed = self.allocate(2 * int(cache))
        with self.here():
            self._flushed.fill_(1)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize(self.name)

    def close(self) -> None:
        self.synchronize()
        self._compilations.close()
        self._flushed = None
        with self.here():
            self.torch.cuda.empty_cache()  # another device's plan counts what the card has free


class CudaGraph:
    """A captured graph of a device."""

    def __init__(self, graph: Any, device: CudaDevice) -> None:
        self._graph, self._device = graph, device

    def replay(self) -> None:
        with self._device.here():
            self._graph.replay()
