"""Trace a value of a kernel body back through views to the placeholder that holds its elements."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from aios_compile.codegen.operand import Dim, Operand, dim_of, multiply
from aios_compile.ir.provenance import source_lines

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Strided:
    """A view of body input `index`: its sizes and strides as an operand, and its first element."""

    index: int
    operand: Operand
    offset: Dim


def add(a: Dim, b: Dim) -> Dim | None:
    """Return a + b where one of them is zero or both are numbers, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else a if b == 0 else None


def resolve(value: Any, operands: Sequence[Operand]) -> Strided | None:
    """Return where a body value lives in the operands; None when it is computed, not a view."""
    if not isinstance(value, fx.Node):
        return None
    if value.op == "placeholder":
        holders = [n for n in value.graph.nodes if n.op == "placeholder"]
        tensors = [n for n in holders if isinstance(n.meta["val"], torch.Tensor)]
        if value not in tensors:
            return None
        index = tensors.index(value)
        return Strided(index, operands[index], 0)
    if value.op != "call_function":
        return None
    source, start, dim = _source(value)
    base = resolve(source, operands)
    if base is None:
        return None
    if value.target in RESHAPES:
        shape = tuple(dim_of(s) for s in value.meta["val"].shape)
        strides = reshaped_strides(base.operand, shape)
        if strides is None:
            return None
        return replace(base, operand=replace(base.operand, shape=shape, strides=strides))
    if dim is None:
        return None
    dim %= len(base.operand.shape)
    offset = add(base.offset, multiply(base.operand.strides[dim], start))
    if offset is None:
        return None
    sizes = list(base.operand.shape)
    sizes[dim] = dim_of(value.meta["val"].shape[dim])
    return Strided(base.index, replace(base.operand, shape=tuple(sizes)), offset)


def _source(node: fx.Node) -> tuple[Any, int, int | None]:
    """Return (viewed value, first index, dimension) of a reshape, slice or part of a split."""
    args: tuple[Any, ...] = node.args
    if node.target in RESHAPES:
        return args[0], 0, None
    if node.target is aten.slice.Tensor:
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        step = args[4] if len(args) > 4 else 1
        if isinstance(start, int) and start >= 0 and step == 1:
            return args[0], start, args[1] if len(args) > 1 else 0
    if node.target is operator.getitem and isinstance(args[0], fx.Node):
        split, part = args[0], args[1]
        rest: tuple[Any, ...] = split.args
        dim: Any = rest[2] if len(rest) > 2 else split.kwargs.get("dim", 0)
        if split.target is aten.split_with_sizes.default:
            return rest[0], sum(rest[1][:part]), dim
        if split.target is aten.split.Tensor:
            return rest[0], rest[1] * part, dim
    return None, 0, None


def reshaped_strides(operand: Operand, shape: Sequence[Dim]) -> tuple[Dim, ...] | None:
    """Return the strides of `operand` viewed as `shape`, or None when that needs a copy.

    Dimensions are matched from the last: each run of new sizes must fill a run of old sizes that is
    dense among itself.
    """
    old = operand.squeezed()
    sizes, steps = list(old.shape), list(old.strides)
    strides: list[Dim] = []
    room: Dim = 1  # elements of the current dense old run that new sizes filled already
    run: Dim = 1
    step: Dim = 1
    for size in reversed(shape):
        if size == 1:
            strides.append(0)
            continue
        if room == run:
            if not sizes:
                return None
            run, step, room = sizes.pop(), steps.pop(), 1
        strides.append(multiply(step, room))
        room = multiply(room, size)
        while room != run:
            grown = _divides(room, run)
            if grown:
                break
            if not sizes or steps[-1] != multiply(step, run):
                return None
            run = multiply(run, sizes.pop())
            steps.pop()
    return tuple(reversed(strides)) if room == run and not sizes else None


def _divides(part: Dim, whole: Dim) -> bool:
    """Return whether `part` elements are a proper part of a run of `whole`."""
    if isinstance(part, int) and isinstance(whole, int):
        return part < whole and whole % part == 0
    return isinstance(part, int)


def body_lines(body: fx.GraphModule) -> tuple[str, ...]:
    """Return the model lines that a kernel body computes, each once."""
    found = [line for n in body.graph.nodes if n.op == "call_function" for line in source_lines(n)]
    return tuple(dict.fromkeys(found))
