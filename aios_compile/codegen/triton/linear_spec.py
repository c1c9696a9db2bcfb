"""What the Triton linear kernels compute: y[t, n] = f(sum over k of x[t, k] * w[n, k], ...).

x[T, K] in any float dtype and any row stride, w[N, K] row-major, sums in float32. A gated tail
reads the halves of w[2F, K] (gate rows, then up rows): two streams of weights, one of columns.
With a norm, x is what aios.rms_norm makes of the operand: x[t, k] / rms(x[t]) * g[k].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aios_compile.codegen.access import (
    Access,
    outputs,
)
from aios_compile.codegen.cpp.head_rows import without_leading_ones
from aios_compile.codegen.cpp.qk_norm_rope_kv_write import computed
from aios_compile.codegen.expression import Expr
from aios_compile.codegen.linear_index import Linear
from aios_compile.codegen.linear_tail import inplace_pairs, read_tail
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.strided import Strided, body_lines, resolve

FLOATS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Norm:
    """A root mean square norm of the rows of x: its weight [K] (None: ones) and its epsilon."""

    eps: float
    weight: Strided | None


@dataclass(frozen=True)
class LinearSpec:
    """Everything the text depends on, but for the configuration.

    operands: inputs, then outputs. A leaf whose operand is len(operands) + s is the sum of stream
    s. values, stores: each output's expression and address over (0 token, 1 column).
    """

    name: str
    x: Strided
    weight: Strided
    streams: int
    operands: tuple[Operand, ...]
    leaves: tuple[Access, ...]
    values: tuple[Expr, ...]
    stores: tuple[Linear, ...]
    lines: tuple[str, ...] = ()
    norm: Norm | None = None

    @property
    def columns(self) -> int:
        rows = self.weight.operand.shape[0]
        assert isinstance(rows, int), "the number of output features is fixed"
        return rows // self.streams

    @property
    def depth(self) -> int:
        depth = self.x.operand.shape[1]
        assert isinstance(depth, int), "the number of input features is fixed"
        return depth

    def outputs(self) -> range:
        return range(len(self.operands) - len(self.values), len(self.operands))


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> LinearSpec | None:
    """Return the spec of a body of one aios.linear and a pointwise tail, else None."""
    targets = (torch.ops.aios.linear.default, torch.ops.aios.linear)
    nodes = [n for n in body.graph.nodes if n.target in targets]
    results = outputs(body)
    if len(nodes) != 1 or not all(isinstance(r, fx.Node) for r in results):
        return None
    source = x_of(nodes[0].args[0], operands)
    weight = resolve(nodes[0].args[1], operands)
    if source is None or weight is None or weight.operand.packed or len(weight.operand.shape) != 2:
        return None
    x, norm = source
    (rows, depth), dtypes = weight.operand.shape, (x.operand.dtype, weight.operand.dtype)
    dense = x.operand.strides[1] == 1 and weight.operand.strides[1] == 1
    if not dense or not isinstance(rows, int) or not isinstance(depth, int):
        return None
    if any(dtype not in FLOATS for dtype in dtypes):
        return None
    bias = nodes[0].args[2] if len(nodes[0].args) > 2 else nodes[0].kwargs.get("bias")
    return with_tail(body, operands, nodes[0], bias, x, weight, norm)


def x_of(value: Any, operands: Sequence[Operand]) -> tuple[Strided, Norm | None] | None:
    """Return where a linear's x[T, K] is read and the norm between, None for anything else.

    Only float32 rows are normalised here: in half precision the norm would round its result.
    """
    node, norm = computed(value), None
    if node is not None and node.target is torch.ops.aios.rms_norm.default:
        value, scale, eps, _ = node.args
        weight = resolve(scale, operands)
        if scale is not None and (weight is None or weight.operand.strides != (1,)):
            return None
        norm = Norm(float(eps), weight)  # type: ignore[arg-type]
    x = without_leading_ones(resolve(value, operands), 2)
    if x is None or (norm is not None and x.operand.dtype != "f32"):
        return None
    return x, norm


def with_tail(
    body: fx.GraphModule,
    operands: Sequence[Operand],
    node: fx.Node,
    bias: Any,
    x: Strided,
    weight: Strided,
    norm: Norm | None = None,
) -> LinearSpec | None:
    """Return the spec of a linear `node` with its bias and the tail that follows it, else None."""
    rows = weight.operand.shape[0]
    if not isinstance(rows, int):
        return None
    tail = read_tail(body, operands, node, bias, x.operand.shape[0], rows)
    if tail is None:
        return None
    return LinearSpec(
        "linear", x, weight, tail.streams, tuple(operands), tail.leaves, tail.values, tail.stores,
        body_lines(body), norm,
    )  # fmt: skip


def inplace(spec: LinearSpec) -> tuple[tuple[int, int], ...]:
    """Return (output, input) pairs that the tail touches at one address; never x or the weight."""
    fixed = (spec.x.index, spec.weight.index)
    return inplace_pairs(spec.operands, spec.outputs().start, spec.leaves, spec.stores, fixed)
