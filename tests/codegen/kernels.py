"""Build generated kernels and call them on torch tensors; trace functions into kernel bodies."""

from __future__ import annotations

import ctypes
import functools
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

import aios_compile.ir.ops
from aios_compile.codegen.cpp import build
from aios_compile.codegen.operand import Operand, dim_value
from aios_compile.codegen.source import KernelSource
from aios_compile.ir.symbols import new_fake, new_fake_mode
from tests.quick_builds import quick_link_flags

assert aios_compile.ir.ops.TABLE
torch.set_num_threads(1)
KEEP = ("silu", "gelu", "_softmax", "_log_softmax")


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "TSRP"]


@functools.lru_cache(maxsize=1)
def folder() -> Path:
    """Return the object cache of this test run."""
    return Path(tempfile.mkdtemp(prefix="aios-test-objects-"))


def library(
    sources: Sequence[KernelSource | tuple[str, str]],
    target: build.Target | None = None,
    flags: Sequence[str] = (),
) -> ctypes.CDLL:
    """Compile and load kernels."""
    target = target or build.Target.host()
    objects = build.build_objects(sources, folder(), target, extra_flags=flags)
    name = f"lib{abs(hash(tuple(objects)))}.so"
    linked = (*flags, *quick_link_flags(target))
    return build.load(build.link(objects, folder() / name, target, extra_flags=linked))


def run(
    source: KernelSource,
    tensors: Sequence[Tensor],
    sizes: dict[str, int],
    split: int = 1,
    target: build.Target | None = None,
) -> None:
    """Call a kernel on inputs and outputs, its items cut into `split` ranges in reverse order."""
    call(library([source], target), source, tensors, sizes, split)


def call(
    lib: ctypes.CDLL,
    source: KernelSource,
    tensors: Sequence[Tensor],
    sizes: dict[str, int],
    split: int = 1,
) -> None:
    assert len(tensors) == source.num_operands
    n = Sizes(**{k: v for k, v in sizes.items() if k in "TSRP"})
    items_of = getattr(lib, f"{source.symbol}_items")
    items_of.restype = ctypes.c_int64
    items = items_of(ctypes.byref(n))
    pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    borders = [items * k // split for k in range(split + 1)]
    for begin, end in reversed(list(itertools.pairwise(borders))):
        getattr(lib, source.symbol)(
            ctypes.byref(n), pointers, ctypes.c_int64(begin), ctypes.c_int64(end)
        )


@functools.cache
def _table() -> dict[Any, Any]:
    table = core_aten_decompositions()
    return {op: f for op, f in table.items() if op._schema.name[6:] not in KEEP}


def trace(
    function: Callable[..., Any], *inputs: tuple[Sequence[Any], torch.dtype]
) -> fx.GraphModule:
    """Trace a function over fake tensors; shape entries are ints or size names such as "T"."""
    mode = new_fake_mode()
    fakes = [new_fake(mode, shape, dtype) for shape, dtype in inputs]
    with mode, enable_python_dispatcher():  # torch 2.11's C++ takes no symbolic sizes
        body = make_fx(function, decomposition_table=_table(), tracing_mode="fake")(*fakes)
    for node, fake in zip([n for n in body.graph.nodes if n.op == "placeholder"], fakes):
        node.meta["val"] = fake
    return drop_sizes(body)


def drop_sizes(body: fx.GraphModule) -> fx.GraphModule:
    body.graph.eliminate_dead_code()
    body.recompile()
    return body


def operands_of(
    body: fx.GraphModule, strides: dict[int, Sequence[Any]] | None = None
) -> list[Operand]:
    """Return the operands of a traced body; `strides` overrides those of an operand."""
    nodes = [n for n in body.graph.nodes if n.op == "placeholder"]
    result = body.graph.output_node().args[0]
    outs = list(result) if isinstance(result, (tuple, list)) else [result]
    named = [(n.name, n.meta["val"]) for n in nodes]
    named += [(f"out{i}" if len(outs) > 1 else "out", n.meta["val"]) for i, n in enumerate(outs)]
    operands = [Operand.of_value(name, value) for name, value in named]
    for index, new in (strides or {}).items():
        old = operands[index]
        operands[index] = Operand(old.name, old.dtype, old.shape, tuple(new), old.packed)
    return operands


def example(operand: Operand, sizes: dict[str, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return a random tensor with an operand's sizes and strides, inside poisoned memory."""
    shape = [dim_value(d, sizes) for d in operand.shape]
    strides = [dim_value(d, sizes) for d in operand.strides]
    span = 1 + sum((s - 1) * t for s, t in zip(shape, strides)) if 0 not in shape else 0
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        memory = torch.rand(span, generator=generator) < 0.5
    elif dtype.is_floating_point:
        memory = torch.randn(span, generator=generator).to(dtype)
    else:
        memory = torch.randint(-9, 9, (span,), generator=generator).to(dtype)
    return memory.as_strided(shape, strides)
