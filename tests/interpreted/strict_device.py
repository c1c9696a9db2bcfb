"""The interpreter as a device that watches what a captured graph may not do.

It stands for the CUDA driver: a graph keeps kernels, grids, scalars and addresses (RecordedGraph);
reading a value back or allocating while a graph is captured is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aios_compile.errors import EngineError
from aios_compile.runtime.device import Graph
from aios_compile.runtime.torch_device import InterpreterDevice

aten = torch.ops.aten
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")
ALLOCATES = ("empty", "zeros", "ones", "full", "clone", "_to_copy", "add", "sub", "mul", "arange")


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise EngineError(f"{name} waits for the device while a graph is captured")
        if name in ALLOCATES:
            raise EngineError(f"{name} allocates while a graph is captured")
        return func(*args, **(kwargs or {}))


class StrictDevice(InterpreterDevice):
    """See the module."""

    def capture(self, run: Callable[[], None]) -> Graph:
        with _Watch():
            return super().capture(run)
