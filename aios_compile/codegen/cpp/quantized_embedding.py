"""out[t, k] = float(u + low) * scale - minimum of row ids[t]: rows of a quantised table.

Layout: the table is packed as quant16 (codegen/packing.py) in any format of ir/quant_format.py, so
that a head that is tied to it streams the same copy; ids i64[T] are clamped to the table; out
float32, row by row. Values are the format's own, bit for bit. Bytes a token: one row of the table,
whose cache lines hold 16 rows. Scalar code: a row takes microseconds and there is one a token.
Items: one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from aios_compile.codegen.access import outputs
from aios_compile.codegen.cpp import quantized_linear
from aios_compile.codegen.cpp.template import constants, kernel, number
from aios_compile.codegen.cpp.template import pointer as address_function
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import body_lines, resolve
from aios_compile.ir.quant_format import QuantFormat


@dataclass(frozen=True)
class QuantizedEmbeddingSpec:
    """Everything the text depends on; the operands by their positions."""

    table: int
    ids: int
    operands: tuple[Operand, ...]
    form: QuantFormat
    lines: tuple[str, ...] = ()


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> QuantizedEmbeddingSpec | None:
    """Return the spec of a body that is one aios.quantized_embedding, else None."""
    nodes = [n for n in body.graph.nodes if n.op == "call_function"]
    if len(nodes) != 1 or nodes[0].target is not torch.ops.aios.quantized_embedding.default:
        return None
    form = QuantFormat.parse(str(nodes[0].args[2]))
    table, ids = (resolve(nodes[0].args[i], operands) for i in (0, 1))
    if table is None or ids is None or table.operand.packed != f"quant16.{form.name}":
        return None
    out = operands[-1]
    simple = len(ids.operand.shape) == 1 and ids.operand.dtype == "i64" and ids.offset == 0
    if not simple or len(outputs(body)) != 1 or out.dtype != "f32" or out.strides[-1] != 1:
        return None
    lines = body_lines(body)
    return QuantizedEmbeddingSpec(table.index, ids.index, tuple(operands), form, lines)


def reference(spec: QuantizedEmbeddingSpec, rows: Tensor, ids: Tensor) -> Tensor:
    """Compute the output in eager PyTorch from unpacked rows."""
    result: Tensor = torch.ops.aios.quantized_embedding.default(rows, ids, spec.form.name)
    return result


def emit(spec: QuantizedEmbeddingSpec) -> KernelSource:
    """Return the kernel's text."""
    table, ids, out = spec.operands[spec.table], spec.operands[spec.ids], spec.operands[-1]
    rows, depth = table.shape[0], out.shape[-1]
    assert isinstance(rows, int) and isinstance(depth, int)
    base = Operand(table.name, "u8", (), ())
    definitions = [
        *quantized_linear.format_definitions(spec.form, depth),
        constants(K=depth, ROWS=rows),
        number("num_tokens", ids.shape[0]),
        address_function("id_at", spec.ids, ids, ("t",)),
        address_function("table", spec.table, base, ()),
        address_function("out_row", len(spec.operands) - 1, out, ("t",)),
    ]
    count = len(spec.operands)
    return kernel("quantized_embedding", spec, definitions, count, lines=spec.lines)
