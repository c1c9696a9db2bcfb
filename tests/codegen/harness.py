"""Make kernel bodies as the compiler does, build their emitted text, run it with ctypes."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from aios_compile.codegen.cpp import build
from aios_compile.codegen.operand import Operand, dim_value
from aios_compile.codegen.source import KernelSource
from aios_compile.ir.symbols import new_fake, new_fake_mode
from tests.codegen.emulated import EmulatedKernels
from tests.quick_builds import quick_flags, quick_link_flags

torch.set_num_threads(1)
FOLDER = Path(tempfile.gettempdir()) / f"aios-test-objects-{os.getuid()}"


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "TSRP"]


class _Propagation(FakeTensorProp):
    """Gives numbers made of sizes their value too, as torch 2.13 does by itself."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, int):
            n.meta["val"] = result
        return result


def make_body(
    function: Callable[..., Any],
    inputs: dict[str, tuple[Sequence[Any], torch.dtype]],
    strided: dict[str, Sequence[int]] | None = None,
    packed: Sequence[str] | dict[str, str] = (),
) -> tuple[fx.GraphModule, list[Operand]]:
    """Trace `function` on fake inputs; return the body and its operands (inputs, then outputs).

    inputs: name -> (sizes, each a number or "T", "S", "R"; dtype). strided: name -> strides.
    packed: name -> layout; names alone are rows16.
    """
    mode = new_fake_mode()
    fakes = []
    for name, (shape, dtype) in inputs.items():
        fake = new_fake(mode, shape, dtype)
        if strided and name in strided:
            with mode:
                fake = torch.empty_strided(fake.shape, strided[name], dtype=dtype)
        fakes.append(fake)
    body = fx.symbolic_trace(function)
    _Propagation(body, mode).propagate_dont_convert_inputs(*fakes)
    layouts = packed if isinstance(packed, dict) else dict.fromkeys(packed, "rows16")
    operands = [
        Operand.of_value(name, fake, layouts.get(name)) for name, fake in zip(inputs, fakes)
    ]
    (result,) = body.graph.output_node().args
    results = result if isinstance(result, (tuple, list)) else (result,)
    for i, node in enumerate(results):
        operands.append(Operand.of_value(f"out{i}", node.meta["val"]))
    return body, operands


class Kernel:
    """A built kernel; call it with sizes and tensors (inputs, then outputs).

    Kernels of another architecture run in an emulator.
    """

    def __init__(self, source: KernelSource, target: build.Target | None = None) -> None:
        target = target or build.Target.host()
        self.source, self.emulated = source, None
        if target.foreign:
            self.emulated = EmulatedKernels([source], target, FOLDER)
            return
        # Grids of shapes and options are about the text; see quick_builds.py.
        objects = build.build_objects([source], FOLDER, target, jobs=1, extra_flags=quick_flags())
        library = objects[0].with_suffix(".so")
        self.library = build.load(build.link(objects, library, target, quick_link_flags(target)))
        self.run = getattr(self.library, source.symbol)
        self.items = getattr(self.library, f"{source.symbol}_items")
        self.items.restype = ctypes.c_int64

    def __call__(
        self,
        sizes: dict[str, int],
        *tensors: Tensor | np.ndarray,
        splits: int = 1,
        last_only: bool = False,
    ) -> None:
        """Run all items in `splits` parts, or only the last item of the last phase."""
        n = Sizes(**sizes)
        shapes = [[dim_value(d, sizes) for d in o.shape] for o in self.source.workspace]
        spaces = [poisoned(shape) for shape in shapes]
        operands = [*tensors, *spaces]
        if self.emulated is not None:
            self.emulated.run(0, sizes, operands, splits, last_only)
            return
        addresses = [t.data_ptr() if isinstance(t, Tensor) else t.ctypes.data for t in operands]
        p = (ctypes.c_void_p * len(addresses))(*addresses)
        items = self.items(ctypes.byref(n))
        two = self.source.finishes and last_only
        self._share(self.run, n, p, [items - 1, items] if last_only and not two else items, splits)
        if self.source.finishes:
            count = getattr(self.library, f"{self.source.symbol}_finish_items")
            count.restype = ctypes.c_int64
            finish = getattr(self.library, f"{self.source.symbol}_finish")
            items = count(ctypes.byref(n), p)
            last = last_only and items > 0
            self._share(finish, n, p, [items - 1, items] if last else items, splits)

    @staticmethod
    def _share(run: Any, n: Sizes, p: Any, items: int | list[int], splits: int) -> None:
        cuts = (
            items if isinstance(items, list) else [items * i // splits for i in range(splits + 1)]
        )
        for begin, end in itertools.pairwise(cuts):
            run(ctypes.byref(n), p, ctypes.c_int64(begin), ctypes.c_int64(end))


def poisoned(shape: Sequence[int]) -> np.ndarray:
    """Return float32 NaNs that begin at a multiple of 64 bytes, as the plan's buffers do."""
    count = int(np.prod(shape))
    raw = np.full(count + 16, np.nan, np.float32)
    first = -raw.ctypes.data % 64 // 4
    return raw[first : first + count].reshape(shape)


def sparse(shape: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
    """Return an array of zeros that takes memory only where it is written."""
    count = int(np.prod(shape, dtype=np.int64))
    memory = mmap.mmap(-1, count * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype).reshape(shape)
