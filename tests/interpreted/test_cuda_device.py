"""Which device and stream a GPU's calls go to, by a driver that keeps what is current a thread.

torch.cuda is replaced by what the CUDA runtime says of it: device and stream are a thread's own and
begin at device 0, a stream belongs to a device, and torch's own stream for captures is made once,
on the device that is current then. What is asked of the driver is noted with where it would go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from aios_compile.errors import EngineError
from aios_compile.runtime.cuda_device import CudaDevice

KERNEL = """
from tests.interpreted.test_cuda_device import NOTED, Kernel

VARIANTS = (dict(most=None, launches=(dict(kernel=Kernel("add"), options={}),)),)


def launch():
    VARIANTS[0]["launches"][0]["kernel"][(1,)](7)
"""
NOTED: list[tuple[str, str]] = []  # what, "device/stream"


class Kernel:
    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: note(f"launch {self.__name__}")


class Driver:
    """See the module. Stands for torch.cuda."""

    def __init__(self) -> None:
        self.own, self.num_streams, self.capture_stream = threading.local(), 0, ""

    def where(self) -> str:
        return getattr(self.own, "stream", "cuda:0/default")

    def current_device(self) -> int:
        return int(self.where()[5])

    def current_stream(self) -> str:
        return self.where()

    def default_stream(self, device: str) -> str:
        return f"{device}/default"

    def Stream(self, device: str = "") -> str:
        self.num_streams += 1
        return f"{device or self.where()[:6]}/{self.num_streams}"

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.own.stream = self.where(), stream
        yield
        self.own.stream = before

    def device(self, name: str) -> Any:
        return self.stream(f"{name}/default")

    def set_device(self, name: str) -> None:
        self.own.stream = f"{name}/default"

    @contextmanager
    def graph(self, graph: Any, pool: Any = None, stream: str = "", **how: Any) -> Iterator[None]:
        self.capture_stream = self.capture_stream or self.Stream()
        assert how == {"capture_error_mode": "thread_local"}, "other threads may use the GPU"
        with self.stream(stream or self.capture_stream):
            self.own.captures = True
            yield
            self.own.captures = False

    def is_current_stream_capturing(self) -> bool:
        return getattr(self.own, "captures", False)

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: note("replay"))

    def Event(self, enable_timing: bool) -> Any:
        return SimpleNamespace(record=lambda stream: NOTED.append(("record", stream)))

    def graph_pool_handle(self) -> int:
        return 1

    def empty_cache(self) -> None:
        note("empty")

    def synchronize(self, name: str) -> None:
        NOTED.append(("synchronize", f"{name}/default"))


DRIVER = Driver()


def note(what: str) -> None:
    NOTED.append((what, DRIVER.where()))


class OnCpu(CudaDevice):
    """Memory of the CPU stands for the card's; the copies are noted."""

    def allocate(self, num_bytes: int) -> Any:
        return torch.zeros(num_bytes, dtype=torch.uint8)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnCpu]:
    NOTED.clear()
    DRIVER.__init__()  # type: ignore[misc]
    monkeypatch.setattr(torch, "cuda", DRIVER)
    plain = torch.Tensor.copy_

    def copy(self: Any, source: Any, non_blocking: bool = False) -> Any:
        note("copy")
        return plain(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    zeros = torch.zeros

    def pinned(size: int, pin_memory: bool = False, **given: Any) -> Any:
        if pin_memory:
            note("pin")
        return zeros(size, **given)

    monkeypatch.setattr(torch, "zeros", pinned)
    DRIVER.capture_stream = DRIVER.Stream()  # somebody has captured on device 0 before
    opened = OnCpu("cuda:1")
    yield opened
    opened.close()


def use(device: OnCpu, folder: Path) -> None:
    """Ask for all that an executor asks for."""
    path = folder / "kernels.py"
    path.write_text(KERNEL)
    module = device.load(path)
    module.launch()
    graph = device.capture(module.launch)
    memory, host = device.allocate(64), device.host_bytes(64)
    mark = device.mark()
    device.upload(memory, 0, host)
    graph.replay()
    device.download(memory, 0, host)
    device.copy(memory, 0, 32, 16)
    device.write(memory, 0, np.ones(4, np.uint8))
    mark.record()


def test_a_second_gpu_is_asked_from_any_thread(device: OnCpu, tmp_path: Path) -> None:
    assert DRIVER.where() == "cuda:0/default", "opening changes nobody's current device"
    errors: list[BaseException] = []

    def work() -> None:
        try:
            use(device, tmp_path)
            assert DRIVER.where() == "cuda:0/default"
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors, errors
    asked = [what for what, _ in NOTED]
    assert asked.count("launch add") == 2 and {"replay", "copy", "pin", "record"} <= {*asked}
    elsewhere = [(what, where) for what, where in NOTED if not where.startswith("cuda:1/")]
    assert not elsewhere, "what would have gone to device 0"
    captured = [where for what, where in NOTED if what == "launch add"]
    assert captured[0] == "cuda:1/default" and captured[1] != "cuda:1/default"
    streams = {where for what, where in NOTED if what != "launch add"}
    assert streams == {"cuda:1/default"}, "marks, copies and graphs are in one order"


def test_a_stream_of_the_callers_is_not_used(device: OnCpu, tmp_path: Path) -> None:
    """Marks are recorded on the device's stream: a copy on another would not be before them."""
    with DRIVER.stream("cuda:1/the caller's"):
        use(device, tmp_path)
    others = [x for x in NOTED if x[1] != "cuda:1/default" and x[0] != "launch add"]
    assert not others, others


def test_each_thread_says_where_descriptors_lie(
    device: OnCpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton keeps that a thread: one that only launches needs it too."""
    import triton

    said: list[Any] = []
    monkeypatch.setattr(triton, "set_allocator", said.append)
    for _ in range(2):
        thread = threading.Thread(target=use, args=(device, tmp_path))
        thread.start()
        thread.join()
    assert len(said) == 2, "once a thread"
    assert said[0](16, 128, None) is device._scratch
    with pytest.raises(EngineError, match="tensor descriptors take"):
        said[0](1 << 30, 128, None)
