"""Devices of the Triton target with torch tensors: what they share, and Triton's interpreter.

torch is imported when a device is made, not before. A GPU is in cuda_device.py, and its driver
captures graphs. The interpreter's graph is the list of launches with the grids, scalars and tensors
that they had, which is what a driver keeps too, so a value that a graph freezes by mistake is
frozen here as well.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.triton import binary_cache
from aios_compile.codegen.triton.binary_cache import every_launch
from aios_compile.errors import ConfigError, EngineError
from aios_compile.runtime.device import Bytes, Device, Graph, Mark, Memory

DTYPES = {
    "*fp32": "float32", "*bf16": "bfloat16", "*fp16": "float16", "*fp64": "float64",
    "*i64": "int64", "*i32": "int32", "*i16": "int16", "*i8": "int8", "*u8": "uint8", "*i1": "bool",
    "*fp8e4nv": "float8_e4m3fn",
}  # fmt: skip


def open_device(name: str) -> Device:
    """Return the device "cuda", "cuda:1" or "interpreter"; ConfigError if it is not there."""
    if name == "interpreter":
        return InterpreterDevice()
    require_cuda(name)
    from aios_compile.runtime.cuda_device import CudaDevice

    return CudaDevice(name)


def card_name(name: str) -> str:
    """Return the card that kernels for a device are made for, e.g. "cuda:90".

    A GPU newer than the newest card that is known gets that card's kernels. Raises ConfigError for
    a GPU that is not there or older than all.
    """
    if name == "interpreter":
        return "cuda:90"
    require_cuda(name)
    import torch

    if torch.version.hip:
        chip = torch.cuda.get_device_properties(name).gcnArchName.split(":")[0]
        return f"hip:{chip}"
    major, minor = torch.cuda.get_device_capability(name)
    known = [card for card in (80, 90, 100) if card <= 10 * major + minor]
    if not known:
        raise ConfigError(f"device={name!r} is sm_{major}{minor}, expected sm_80 or newer")
    return f"cuda:{known[-1]}"


def gpu_name(name: str) -> str:
    """Return what the driver calls a GPU ("NVIDIA H200"): kernels are measured for one of them."""
    import torch

    return str(torch.cuda.get_device_name(name))


def require_cuda(name: str) -> None:
    """Raise ConfigError unless torch and Triton can use the GPU `name`."""
    import torch

    advice = "use device='cpu', or look at the kernels with `aios compile MODEL --target cuda:90`"
    if not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: torch {torch.__version__} sees no GPU", advice=advice)
    index = name.partition(":")[2] or "0"
    if not index.isdigit() or int(index) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"device={name!r}: there are {found} GPUs", advice=advice)
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"device={name!r}: triton is not installed", advice=advice)


class PassedMark:
    """A mark of a device that has run everything when it is recorded."""

    is_passed = True

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def wait(self) -> None:
        pass

    def micros_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, PassedMark), "marks of one device"
        return (self.seconds - earlier.seconds) * 1e6


class TorchDevice:
    """What both devices share. `name` is torch's name of the device."""

    runs_ahead = False

    def __init__(self, name: str) -> None:
        import torch

        self.torch, self.name = torch, name

    def allocate(self, num_bytes: int) -> Memory:
        try:
            return self.torch.zeros(max(num_bytes, 1), dtype=self.torch.uint8, device=self.name)
        except (RuntimeError, MemoryError) as error:
            raise EngineError(f"{self.name} has no {num_bytes} bytes left: {error}") from error

    def typed(self, memory: Memory, offset: int, pointer: str) -> Any:
        dtype = getattr(self.torch, DTYPES[pointer])
        size = (memory.numel() - offset) // dtype.itemsize * dtype.itemsize
        return memory[offset : offset + size].view(dtype)

    def write(self, memory: Memory, offset: int, array: NDArray[Any]) -> None:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if len(raw):
            source = self.torch.from_numpy(raw if raw.flags.writeable else raw.copy())
            memory[offset : offset + len(raw)].copy_(source)

    def upload(self, memory: Memory, offset: int, staged: Bytes) -> None:
        source = self.torch.from_numpy(staged)
        memory[offset : offset + len(staged)].copy_(source, non_blocking=True)

    def download(self, memory: Memory, offset: int, into: Bytes) -> None:
        target = self.torch.from_numpy(into)
        target.copy_(memory[offset : offset + len(into)], non_blocking=True)

    def copy(self, memory: Memory, source: int, target: int, num_bytes: int) -> None:
        memory[target : target + num_bytes].copy_(memory[source : source + num_bytes])

    def load(self, path: Path) -> Any:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        binary_cache.settle_keys(module)
        return module

    @property
    def num_compiled(self) -> int:
        return 0

    def num_processors(self) -> int | None:
        return None

    def use_binaries(self, artefact: Path) -> None:
        pass

    def memory(self) -> tuple[int, int] | None:
        """Return the (free, total) bytes of a card of its own, None where it is the host's."""
        return None

    def mark(self) -> Mark:
        return PassedMark()

    def flush_cache(self) -> None:
        pass

    def close(self) -> None:
        pass


class OnDevice:
    """A kernel of a loaded module; whoever launches it, it is the device that launches it."""

    def __init__(self, kernel: Any, device: Any) -> None:
        self.kernel, self.device = kernel, device
        self.__name__ = kernel.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.device.launch(self.kernel, grid, arguments, options)

        return launch


def launched_by(device: Any, module: Any) -> Any:
    """Return a loaded module whose kernels `device` launches."""
    for known in every_launch(module):
        known.launch["kernel"] = OnDevice(known.launch["kernel"], device)
    return module


class RecordedGraph:
    """Launches as they were captured: kernel, grid, tensors and numbers."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def replay(self) -> None:
        for kernel, grid, arguments, options in self.launches:
            kernel[grid](*arguments, **options)


class InterpreterDevice(TorchDevice):
    """Triton's interpreter on the CPU: for tests and for reading along, thousands of times slower.

    `num_launches` counts what has run outside of graphs.
    """

    def __init__(self) -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(
                "device='interpreter' needs TRITON_INTERPRET=1 before Python starts",
                advice="run TRITON_INTERPRET=1 aios ... --device interpreter",
            )
        _check_versions()
        super().__init__("cpu")
        self.graph: RecordedGraph | None = None
        self.num_launches = 0

    def host_bytes(self, num_bytes: int) -> Bytes:
        return np.zeros(max(num_bytes, 1), np.uint8)

    def load(self, path: Path) -> Any:
        return launched_by(self, super().load(path))

    def launch(self, kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
        """Run a kernel, or note it in the graph that is being captured."""
        if self.graph is not None:
            self.graph.launches.append((kernel, grid, arguments, options))
        else:
            self.num_launches += 1
            kernel[grid](*arguments, **options)

    def capture(self, run: Callable[[], None]) -> Graph:
        self.graph = graph = RecordedGraph()
        try:
            run()
        finally:
            self.graph = None
        return graph

    def synchronize(self) -> None:
        pass


def _check_versions() -> None:
    """Raise ConfigError where the interpreter is known to fail: Triton 3.6's turns arrays of one
    element into numbers, which NumPy refuses from 2.4 on.
    """
    import triton

    versions = (triton.__version__, np.__version__)
    ours, numpy = (tuple(map(int, text.split(".")[:2])) for text in versions)
    if ours < (3, 7) and numpy >= (2, 4):
        raise ConfigError(
            f"device='interpreter': Triton {versions[0]}'s interpreter fails with NumPy "
            f"{versions[1]}",
            advice="install numpy<2.4, or triton>=3.7",
        )
