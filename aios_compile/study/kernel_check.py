"""Run one compiled kernel alone and compare it with its reference: the body that it was made of.

Operands are laid out as the step lays them out (strides, packed weights, states written in place),
each at a multiple of 64 bytes.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from aios_compile.codegen.cpp import build
from aios_compile.codegen.emit_kernels import Emitted, tensor_arguments
from aios_compile.codegen.operand import BYTES, Operand, dim_value
from aios_compile.codegen.pack_weights import to_numpy
from aios_compile.codegen.packing import FLOAT_LAYOUTS, kind_of, pack
from aios_compile.codegen.source import KernelSource
from aios_compile.errors import CodegenError
from aios_compile.ir import evaluate
from aios_compile.ir.module import body_of, placeholders
from aios_compile.ir.quantized import LARGEST_CODE
from aios_compile.passes.certificate import FACTORS
from aios_compile.passes.measure import FLOOR_ROUNDINGS

FACTOR = FACTORS["exact"]  # times eager's own error: a kernel may sum in another order
Array = NDArray[Any]


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("T", "S", "R", "P")]


@dataclass(frozen=True)
class Checked:
    """How far a kernel is from float64, and how far it may be, relative to the largest value."""

    error: float
    budget: float

    @property
    def holds(self) -> bool:
        return self.error <= self.budget


class Kernels:
    """Kernels built into one library of their own, called one at a time; `close` unmaps it.

    target: an instruction set that this machine has; the host's without it.
    """

    def __init__(
        self,
        sources: Sequence[KernelSource],
        folder: Path,
        objects_folder: Path | None = None,
        target: build.Target | None = None,
    ) -> None:
        target = target or build.Target.host()
        objects = build.build_objects(sources, objects_folder or folder / "objects", target)
        name = f"kernels-{sources[0].digest()[:16]}-{len(sources)}.so"
        self._library = build.load(build.link(objects, folder / name, target))

    def has(self, symbol: str) -> bool:
        """Return whether the library defines a kernel."""
        return all(hasattr(self._library, name) for name in (symbol, f"{symbol}_items"))

    def run(
        self, symbol: str, sizes: Mapping[str, int], pointers: Sequence[int], splits: int = 1
    ) -> None:
        """Run all work items of a kernel, in `splits` parts, and of its second phase if any."""
        n = _Sizes(*(sizes.get(name, 1) for name in ("T", "S", "R", "P")))
        p = (ctypes.c_void_p * len(pointers))(*pointers)
        finish = hasattr(self._library, f"{symbol}_finish")
        for name, arguments in ((symbol, ()), *([(f"{symbol}_finish", (p,))] if finish else [])):
            items = getattr(self._library, f"{name}_items")
            items.restype = ctypes.c_int64
            count = items(ctypes.byref(n), *arguments)
            cuts = [count * i // splits for i in range(splits + 1)]
            for begin, end in itertools.pairwise(cuts):
                getattr(self._library, name)(
                    ctypes.byref(n), p, ctypes.c_int64(begin), ctypes.c_int64(end)
                )

    def close(self) -> None:
        """Unmap the library; nothing may be running in it."""
        build.unload(self._library)


@dataclass
class Prepared:
    """One kernel call with its operands in memory: run it, read the results, as often as wanted."""

    call: fx.Node
    symbol: str
    sizes: Mapping[str, int]
    arrays: list[Array]
    results: list[tuple[Array, Operand, tuple[int, ...]]]

    def run(self, kernels: Kernels, splits: int = 1) -> None:
        """Run the kernel of a library, its work items in `splits` parts."""
        kernels.run(self.symbol, self.sizes, [a.ctypes.data for a in self.arrays], splits)

    def times(self, kernels: Kernels, other: Kernels, repeats: int = 15) -> float:
        """Return how long the kernel takes in one library, in units of its time in another.

        Both are run in turn, each time long enough for the clock; the quickest counts.
        """
        best = [math.inf, math.inf]
        begin = time.perf_counter()
        self.run(kernels)
        count = math.ceil(5e-4 / max(1e-7, time.perf_counter() - begin))
        for _ in range(repeats):
            for i, library in enumerate((kernels, other)):
                begin = time.perf_counter()
                for _ in range(count):
                    self.run(library)
                best[i] = min(best[i], time.perf_counter() - begin)
        return best[0] / best[1]

    def tensors(self) -> list[Tensor]:
        """Return copies of the results."""
        found = []
        for array, operand, shape in self.results:
            dtype = _TORCH[operand.dtype]
            strides = [dim_value(d, self.sizes) for d in operand.strides]
            flat = torch.from_numpy(array.view(np.uint8)).view(dtype)
            found.append(flat.as_strided(shape, strides).clone())
        return found


_TORCH = {
    "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
    "u8": torch.uint8, "e4m3": torch.float8_e4m3fn, "bool": torch.bool,
}  # fmt: skip


def prepare(
    call: fx.Node, emitted: Emitted, values: Sequence[Any], sizes: Mapping[str, int]
) -> Prepared:
    """Lay out the operands of a kernel call. values: what its arguments are, in their order.

    Raises CodegenError for a weight layout that is not known here.
    """
    source = emitted.sources[emitted.by_call[call]]
    tensors = tensor_arguments(call)
    given = dict(zip(call.args, values))
    arrays = []
    for i, argument in enumerate(tensors):
        packing = emitted.packed.get((call, i))
        operand = Operand.of_value(argument.name, argument.meta["val"], packing)
        arrays.append(_operand_array(operand, given[argument], sizes))
    in_place: Mapping[int, int] = call.meta.get("written_in_place", {})
    results = []
    kinds = call.meta["val"] if isinstance(call.meta["val"], (tuple, list)) else [call.meta["val"]]
    for i, kind in enumerate(kinds):
        operand = Operand.of_value(f"out{i}", kind)
        if i in in_place:
            state = call.args[in_place[i]]
            assert isinstance(state, fx.Node)
            array, shape = arrays[tensors.index(state)], tuple(given[state].shape)
        else:
            shape = tuple(dim_value(d, sizes) for d in operand.shape)
            array = _aligned(_span(shape, operand, sizes) * _TORCH[operand.dtype].itemsize)
        results.append((array, operand, shape))
    spaces = [
        _aligned(math.prod(dim_value(d, sizes) for d in space.shape) * BYTES[space.dtype])
        for space in source.workspace
    ]
    arrays = [*arrays, *(r[0] for r in results), *spaces]
    return Prepared(call, source.symbol, sizes, arrays, results)


def _operand_array(operand: Operand, value: Tensor, sizes: Mapping[str, int]) -> Array:
    value = value.detach().to(_TORCH[operand.dtype])
    if operand.packed and kind_of(operand.packed) in (*FLOAT_LAYOUTS, "quant16"):
        packed = pack(to_numpy(value.contiguous()), operand.packed, operand.name)
        array = _aligned(packed.nbytes)
        array[: packed.nbytes] = packed.reshape(-1).view(np.uint8)
        return array
    if operand.packed is not None:
        raise CodegenError(f"{operand.name}: weights packed as {operand.packed} cannot be checked")
    shape = tuple(value.shape)
    array = _aligned(_span(shape, operand, sizes) * value.element_size())
    strides = [dim_value(d, sizes) for d in operand.strides]
    torch.from_numpy(array).view(value.dtype).as_strided(shape, strides).copy_(value)
    return array


def _span(shape: Sequence[int], operand: Operand, sizes: Mapping[str, int]) -> int:
    """Return how many elements lie between the first and the last, both included."""
    if 0 in shape:
        return 1
    return 1 + sum((s - 1) * dim_value(d, sizes) for s, d in zip(shape, operand.strides))


def _aligned(num_bytes: int) -> Array:
    """Return zeroed bytes at a multiple of 64, with room for a whole vector at the end."""
    raw = np.zeros(num_bytes + 192, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + -(-num_bytes // 64) * 64]


def check(
    call: fx.Node,
    emitted: Emitted,
    values: Sequence[Any],
    sizes: Mapping[str, int],
    run: Callable[[Prepared], None],
) -> Checked:
    """Run a C++ kernel on the values of its arguments, against its body in float64."""

    def results(values: Sequence[Any]) -> list[Tensor]:
        prepared = prepare(call, emitted, values, sizes)
        run(prepared)
        return prepared.tensors()

    return compare_with_body(call, values, results)


def compare_with_body(
    call: fx.Node,
    values: Sequence[Any],
    results: Callable[[Sequence[Any]], list[Tensor]],
    least: float = 0.0,
) -> Checked:
    """Return how far the results of a kernel on values are from those of its body in float64.

    The budget is FACTOR times the error of the body in PyTorch, plus a few roundings; of floats
    at least `least`.
    """
    body = body_of(call)
    kinds = [n.meta["val"] for n in placeholders(body.graph)]
    values = [v.to(k.dtype) if _is_float(v) else v for v, k in zip(values, kinds)]
    native = _results(evaluate.call(body, values))
    wide = [v.double() if _is_float(v) else v for v in values]
    oracle = _results(evaluate.call(body, wide, computed_in=torch.float64))
    worst = Checked(0.0, math.inf)
    for o, b, a in zip(oracle, native, results(values)):
        found = _compare(o, b, a)
        found = replace(found, budget=max(found.budget, least))
        if found.error / found.budget >= worst.error / worst.budget:
            worst = found
    return worst


def _results(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _is_float(value: Any) -> bool:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return floats and value.dtype not in LARGEST_CODE


def _compare(oracle: Tensor, native: Tensor, result: Tensor) -> Checked:
    if native.dtype in LARGEST_CODE:  # codes of a KV cache: rounding may choose the neighbour
        return Checked(_gap(_places(result), _places(oracle)), 1.0)
    if not _is_float(native):
        wrong = ((result != oracle) & (native == oracle)).any()  # rounding may decide an integer
        return Checked(math.inf if bool(wrong) else 0.0, 1.0)
    finite = oracle[oracle.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    scale = scale or 1.0
    budget = FACTOR * _gap(native, oracle) / scale
    budget += FLOOR_ROUNDINGS * torch.finfo(native.dtype).eps
    return Checked(_gap(result, oracle) / scale, budget)


def _places(codes: Tensor) -> Tensor:
    """Return the places of codes among all codes of their dtype in ascending order."""
    if codes.dtype == torch.int8:
        return codes
    bits = codes.contiguous().view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def _gap(value: Tensor, oracle: Tensor) -> float:
    value, oracle = value.double(), oracle.double()
    same = (value == oracle) | (value.isnan() & oracle.isnan())
    gap = torch.nan_to_num((value - oracle).abs().masked_fill(same, 0.0), nan=math.inf)
    return float(gap.max()) if gap.numel() else 0.0
