"""y[t, n] = f(sum_k q(x)[t, k] * w[n, k], ...): a linear on quantised weights, any pointwise tail.

Layouts: x[T, K] float32 (any row stride); w packed as quant16 (codes and scales of 16 rows in one
stream, codegen/packing.py) in any format of ir/quant_format.py; the tail as in linear.py, gated
halves included. Tokens are quantised to int8 by 32 values, then dot products are whole numbers:
vpdpbusd (AVX-512, AVX), vpmaddubsw (AVX2; four-bit codes are summed in 16 bits), sdot (NEON), or
shifts and products of plain vectors. Their float part is one chain of fused multiply-adds over
groups ascending: the same bits for every path, T, tile and split.
Bytes: w once for up to 8 tokens (4 on AVX2), and once for each chunk of tokens whose prepared copy
fits in L2 beyond that. Items: as in linear.py; prepared tokens lie row by row, each in cache lines
of its own, so that all workers prepare them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.codegen.access import outputs
from aios_compile.codegen.cpp import linear
from aios_compile.codegen.cpp.candidates import candidates_of
from aios_compile.codegen.cpp.head_rows import without_leading_ones
from aios_compile.codegen.cpp.template import C_TYPES, constants, kernel
from aios_compile.codegen.emit_kernels import layout_in
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.packing import joint_groups
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import Strided, resolve
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantized import ACTIVATION_GROUP

TYPES = {**C_TYPES, "k": "int8_t", "": "uint8_t", "zero": "uint8_t"}


@dataclass(frozen=True)
class QuantizedLinearSpec:
    """A linear's spec (its weight are the rows), and the format of the rows.

    order: the column of each value of a row, where columns were sorted by group.
    """

    linear: linear.LinearSpec
    form: QuantFormat
    order: Strided | None = None


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> QuantizedLinearSpec | None:
    """Return the spec of a body of one aios.quantized_linear and a pointwise tail, else None."""
    target = torch.ops.aios.quantized_linear.default
    nodes = [n for n in body.graph.nodes if n.target is target]
    if len(nodes) != 1 or not all(isinstance(r, fx.Node) for r in outputs(body)):
        return None
    form = QuantFormat.parse(str(nodes[0].args[2]))
    x = without_leading_ones(resolve(nodes[0].args[0], operands), 2)
    weight = resolve(nodes[0].args[1], operands)
    if x is None or weight is None or form.is_float:
        return None
    if weight.operand.packed != layout_in(body, nodes[0].args[1], f"quant16.{form.name}"):
        return None
    depth, dense = x.operand.shape[1], x.operand.strides[1] == 1 and x.operand.dtype == "f32"
    if not dense or not isinstance(depth, int):
        return None
    bias, order = bias_and_order(nodes[0])
    columns = resolve(order, operands)
    if order is not None and (columns is None or columns.operand.dtype != "i32"):
        return None
    spec = linear.with_tail(body, operands, nodes[0], bias, x, weight.index)
    return None if spec is None else QuantizedLinearSpec(spec, form, columns)


def bias_and_order(node: fx.Node) -> tuple[Any, Any]:
    """Return the bias and the order of the columns of an aios.quantized_linear, None for none."""
    given = dict(zip(("bias", "order"), node.args[3:])) | node.kwargs
    return given.get("bias"), given.get("order")


def reference(spec: QuantizedLinearSpec, body: fx.GraphModule, *tensors: Tensor) -> Any:
    """Compute the outputs in eager PyTorch from unpacked rows: the body is the definition."""
    return body(*tensors)


def emit(spec: QuantizedLinearSpec) -> KernelSource:
    """Return the kernel's text."""
    base = spec.linear
    words = prepared_words(spec.form, base.depth)
    definitions = [*format_definitions(spec.form, base.depth), constants(WORDS=words)]
    definitions += [*linear.definitions(base), *order_definitions(spec.order)]
    rows = base.columns * base.streams
    source = kernel(
        "quantized_linear",
        spec,
        definitions,
        base.outputs().stop,
        inplace=linear.inplace(base),
        lines=base.lines,
        headers=("tiles.h", "quantized.h"),
        finishes=True,
        candidates=candidates_of(rows * spec.form.row_bytes(base.depth)),
    )
    return dataclasses.replace(source, workspace=(linear.workspace(base, words),))


def order_definitions(order: Strided | None) -> list[str]:
    """Return whether x is read in another order, and the function that gives it."""
    if order is None:
        return [constants(ORDERED=False), "const int32_t* column_of(void* const*, int64_t);"]
    step = order.operand.strides[0]
    assert step == 1 and order.offset == 0, "an order is a whole weight"
    text = f"return (const int32_t*)p[{order.index}] + k;"
    return [
        constants(ORDERED=True),
        f"AIOS_INLINE const int32_t* column_of(void* const* p, int64_t k) {{ {text} }}",
    ]


def prepared_words(form: QuantFormat, depth: int) -> int:
    """Return the words of 32 bits of a quantised token of `depth` values: Token in the template.

    Codes; a scale a group of activations; where dot products begin (and, for formats with minimums,
    what those meet) for each group of the finer of weights and activations; whole cache lines.
    """
    steps = depth // min(form.group, ACTIVATION_GROUP)
    words = depth // 4 + depth // ACTIVATION_GROUP + steps + (steps if form.minimums else 1)
    return -(-words // linear.LINE_WORDS) * linear.LINE_WORDS


def format_definitions(form: QuantFormat, depth: int) -> list[str]:
    """Return the constants and types of a format, which the templates on its rows of `depth` values
    read.
    """
    minimum = "uint8_t" if form.minimums == "k" else TYPES[form.minimums]
    return [
        f"// weights: {form.name}",
        f"using Scale = {TYPES[form.scales]};\nusing Minimum = {minimum};",
        constants(
            BITS=form.bits,
            GROUP=form.group,
            LOW=form.low,
            SPAN=form.span,
            HEADER=form.header_bytes,
            GROUP_BYTES=form.group_bytes,
            JOINT=joint_groups(form, depth),
            MINIMUMS=bool(form.minimums),
            SUPER_SCALE=form.scales == "k",
            SUPER_MINIMUM=form.minimums == "k",
            ZERO_POINT=form.minimums == "zero",
        ),
    ]
