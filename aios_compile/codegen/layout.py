"""Where the values of a level-3 graph live: views are followed to the buffer behind them."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aios_compile.codegen.operand import BYTES, DTYPE_NAMES, Dim, dim_of, dim_value, multiply
from aios_compile.errors import CodegenError
from aios_compile.ir import provenance
from aios_compile.ir.module import body_of, is_kernel_call, is_region_call, outputs, placeholders

aten = torch.ops.aten
VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.slice.Tensor, aten.select.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.expand.default,
    aten.alias.default, aten.detach.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.as_strided.default,
}  # fmt: skip

PLAIN = VIEWS | {operator.getitem, aten.sym_size.int}


@dataclass(frozen=True)
class Base:
    """A buffer: the placeholder, kernel call or region call that makes it, and which result."""

    node: fx.Node
    result: int = 0

    @property
    def name(self) -> str:
        many = isinstance(self.node.meta["val"], (tuple, list))
        return f"{self.node.name}.{self.result}" if many else self.node.name

    @property
    def value(self) -> Any:
        value = self.node.meta["val"]
        return value[self.result] if isinstance(value, (tuple, list)) else value


def base_of(node: fx.Node) -> Base:
    """Follow views and getitems to the buffer of a value.

    A region result that is one of the region's own inputs is that input's buffer, and a kernel
    result that is written in place (a KV cache) is its operand's buffer.
    """
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.op == "call_module":
            return result_base(source, int(node.args[1]))  # type: ignore[arg-type]
        return base_of(source)
    if node.op == "call_function" and node.target in VIEWS:
        assert isinstance(node.args[0], fx.Node)
        return base_of(node.args[0])
    if node.op == "call_module":
        return result_base(node, 0)
    return Base(node)


def result_base(call: fx.Node, result: int) -> Base:
    owner = call.graph.owning_module
    assert owner is not None
    if is_region_call(owner, call):
        region = body_of(call)
        inner = base_of(outputs(region.graph)[result])
        if inner.node.op == "placeholder":
            argument = call.args[placeholders(region.graph).index(inner.node)]
            assert isinstance(argument, fx.Node)
            return base_of(argument)
        return Base(call, result)
    shared = call.meta.get("written_in_place", {})
    if result in shared:
        argument = call.args[shared[result]]
        assert isinstance(argument, fx.Node)
        return base_of(argument)
    return Base(call, result)


def shift_bytes(node: fx.Node) -> Dim:
    """Return how far a value begins behind its buffer's begin, in bytes."""
    value = node.meta["val"]
    return multiply(dim_of(value.storage_offset()), BYTES[DTYPE_NAMES[str(value.dtype)]])


def num_bytes(value: Any, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a dense tensor at the given sizes."""
    shape = [dim_value(dim_of(s), sizes) for s in value.shape]
    return math.prod(shape) * BYTES[DTYPE_NAMES[str(value.dtype)]]


def check_dense(node: fx.Node, value: Any) -> None:
    """Raise unless a kernel result fills its memory without holes or overlap, or has none."""
    if any(_hint(size) == 0 for size in value.shape):
        return
    hints = sorted(
        (_hint(st), _hint(s)) for st, s in zip(value.stride(), value.shape) if _hint(s) != 1
    )
    expected = 1
    for stride, size in hints:
        if stride != expected:
            raise CodegenError(
                f"kernel {node.target} makes a tensor of shape {tuple(value.shape)} with strides "
                f"{tuple(value.stride())}, expected dense memory",
                source_line=provenance.source_line(node),
            )
        expected *= size


def _hint(size: Any) -> int:
    """Return the traced value of a size; int(size) would specialise the graph to it."""
    return size if isinstance(size, int) else int(size.node.hint)


def compute_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return kernel calls and region calls in order; anything else that computes is an error."""
    found = []
    for node in graph.nodes:
        if node.op == "call_module":
            found.append(node)
        elif node.op == "call_function" and node.target not in PLAIN and _is_data(node):
            raise CodegenError(
                f"{node.target} is not a kernel call at level 3",
                source_line=provenance.source_line(node),
            )
    return found


def _is_data(node: fx.Node) -> bool:
    """Return whether a node makes tensors; arithmetic on sizes ends up in the shapes of others."""
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def kernel_calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in compute_nodes(graph) if is_kernel_call(n)]
