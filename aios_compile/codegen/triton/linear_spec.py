"""What the Triton linear kernels compute: y[t, n] = f(sum over k of x[t, k] * w[n, k], ...).

x[T, K] in any float dtype and any row stride, w[N, K] row-major, sums in float32. A gated tail
reads the halves of w[2F, K] (gate rows, then up rows): two streams of weights, one of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aios_compile.codegen.access import (
    Access,
    Coordinates,
    NotExpressible,
    Reader,
    outputs,
    shape_of,
    store_address,
)
from aios_compile.codegen.cpp.head_rows import without_leading_ones
from aios_compile.codegen.expression import Expr, Index, call
from aios_compile.codegen.linear_index import Linear
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.strided import Strided, body_lines, resolve

FLOATS = ("f32", "bf16", "f16")


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
    x = without_leading_ones(resolve(nodes[0].args[0], operands), 2)
    weight = resolve(nodes[0].args[1], operands)
    if x is None or weight is None or weight.operand.packed or len(weight.operand.shape) != 2:
        return None
    (rows, depth), dtypes = weight.operand.shape, (x.operand.dtype, weight.operand.dtype)
    dense = x.operand.strides[1] == 1 and weight.operand.strides[1] == 1
    if not dense or not isinstance(rows, int) or not isinstance(depth, int):
        return None
    if any(dtype not in FLOATS for dtype in dtypes):
        return None
    bias = nodes[0].args[2] if len(nodes[0].args) > 2 else nodes[0].kwargs.get("bias")
    return with_tail(body, operands, nodes[0], bias, x, weight)


def with_tail(
    body: fx.GraphModule,
    operands: Sequence[Operand],
    node: fx.Node,
    bias: Any,
    x: Strided,
    weight: Strided,
) -> LinearSpec | None:
    """Return the spec of a linear `node` with its bias and the tail that follows it, else None."""
    rows, results = weight.operand.shape[0], outputs(body)
    if not isinstance(rows, int):
        return None
    widths = {shape_of(r)[-1] for r in results}
    streams = 1 if widths == {rows} else 2
    if streams == 2 and (widths != {rows // 2} or rows % 2):
        return None
    columns = rows // streams

    def sum_of(reader: Reader, at: fx.Node, coordinates: Coordinates) -> Expr | None:
        if at is not node:
            return None
        column = coordinates[-1]
        stream_at = {s * columns: s for s in range(streams)}
        if column.without(1) != Linear((), column.constant) or column.constant not in stream_at:
            raise NotExpressible(f"the tail reads column {column} of a linear")
        if any(c not in (Linear(), Linear.of(Index(0))) for c in coordinates[:-1]):
            raise NotExpressible("the tail mixes tokens of a linear")
        stream = len(operands) + stream_at[column.constant]
        value: Expr = reader.leaf(Access(stream, Linear.of(Index(1))), "f32")
        return value if bias is None else call("add", (value, reader.at(bias, (column,))), "f32")

    reader = Reader(body, operands, ((0, None), (0, columns)), sum_of)
    values, stores = [], []
    for result, out in zip(results, operands[len(operands) - len(results) :]):
        shape = shape_of(result)
        if len(shape) < 2 or any(s != 1 for s in shape[:-2]) or shape[-2] != x.operand.shape[0]:
            return None
        token = Linear() if shape[-2] == 1 else Linear.of(Index(0))
        place = (*(Linear() for _ in shape[:-2]), token, Linear.of(Index(1)))
        try:
            values.append(reader.at(result, place))
        except NotExpressible:
            return None
        stores.append(store_address(out, place))
    leaves = tuple(leaf for leaf in reader.leaves if isinstance(leaf, Access))
    if reader.cuts or len(leaves) != len(reader.leaves):
        return None
    return LinearSpec(
        "linear", x, weight, streams, tuple(operands), leaves, tuple(values), tuple(stores),
        body_lines(body),
    )  # fmt: skip


def inplace(spec: LinearSpec) -> tuple[tuple[int, int], ...]:
    """Return (output, input) pairs that the tail touches at one address; never x or the weight."""
    pairs = []
    for number, index in enumerate(spec.outputs()):
        for operand in range(spec.outputs().start):
            same = spec.operands[operand].dtype == spec.operands[index].dtype
            reads = [leaf.address for leaf in spec.leaves if leaf.operand == operand]
            fixed = operand in (spec.x.index, spec.weight.index)
            if same and reads and not fixed and all(r == spec.stores[number] for r in reads):
                pairs.append((number, operand))
    return tuple(pairs)
