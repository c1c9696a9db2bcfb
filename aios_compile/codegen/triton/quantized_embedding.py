"""out[t, k] = float(u + low) * scale - minimum of row ids[t]: rows of a quantised table.

Layout: the table is planar (codegen/planar.py), the copy that a head tied to it streams; ids i64[T]
are clamped to the table; out float32 rows. Values are the format's own, bit for bit: nothing is
contracted. Bytes a token: one row of the table and one of out. Grid: BLOCK elements of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from aios_compile.codegen.access import outputs
from aios_compile.codegen.naming import layout, symbol_of, variable
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.plane import PREFIX, Plane, plane_of
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import body_lines, resolve
from aios_compile.codegen.triton.frame import Launch, Variant, module_text, python_dim, signature
from aios_compile.codegen.triton.quantized_linear import DTYPES
from aios_compile.ir.quant_format import QuantFormat

BLOCK = 1024


@dataclass(frozen=True)
class QuantizedEmbeddingSpec:
    """Everything the text depends on; the operands by their positions."""

    table: int
    ids: int
    operands: tuple[Operand, ...]
    form: QuantFormat
    plane: Plane
    lines: tuple[str, ...] = ()


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> QuantizedEmbeddingSpec | None:
    """Return the spec of a body that is one aios.quantized_embedding, else None."""
    nodes = [n for n in body.graph.nodes if n.op == "call_function"]
    if len(nodes) != 1 or nodes[0].target is not torch.ops.aios.quantized_embedding.default:
        return None
    form = QuantFormat.parse(str(nodes[0].args[2]))
    table, ids = (resolve(nodes[0].args[i], operands) for i in (0, 1))
    if form.is_float or table is None or ids is None or table.operand.packed != PREFIX + form.name:
        return None
    out, depth = operands[-1], operands[-1].shape[-1]
    simple = len(ids.operand.shape) == 1 and ids.operand.dtype == "i64" and ids.offset == 0
    if not simple or len(outputs(body)) != 1 or out.dtype != "f32" or out.strides[-1] != 1:
        return None
    if not isinstance(depth, int) or depth % 32:
        return None
    lines, plane = body_lines(body), plane_of(form, depth)
    return QuantizedEmbeddingSpec(table.index, ids.index, tuple(operands), form, plane, lines)


def reference(spec: QuantizedEmbeddingSpec, rows: Tensor, ids: Tensor) -> Tensor:
    """Compute the output in eager PyTorch from rows that are not packed."""
    result: Tensor = torch.ops.aios.quantized_embedding.default(rows, ids, spec.form.name)
    return result


def emit(spec: QuantizedEmbeddingSpec) -> KernelSource:
    """Return the module."""
    symbol, plane = symbol_of("quantized_embedding", spec), spec.plane
    table, ids, out = spec.operands[spec.table], spec.operands[spec.ids], spec.operands[-1]
    pieces = -(-plane.depth // BLOCK)
    code = "codes" if plane.bits == 8 else "(codes >> (k % 32 // 16 * 4).to(tl.uint8)) & 15"
    place = "k" if plane.bits == 8 else "k // 32 * 16 + k % 16"
    id_at = f"{variable(ids, spec.ids)} + item // {pieces} * {python_dim(ids.strides[0])}"
    row = f"{variable(table, spec.table)} + id * {plane.row_bytes}"
    to = (
        f"{variable(out, len(spec.operands) - 1)} + item // {pieces} * {python_dim(out.strides[0])}"
    )
    load = f"mask=k < {plane.depth}, other=0"
    lines = [
        "item = tl.program_id(0).to(tl.int64)",
        f"id = tl.minimum(tl.maximum(tl.load({id_at}), 0), {table.shape[0]} - 1)",
        f"row = {row}",
        f"k = (item % {pieces}).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)",
        f"codes = tl.load(row + {place}, {load})",
        f"u = ({code}).to(tl.float32) + {float(plane.low)}",
        f"scales = (row + {plane.scale_begin}).to(tl.pointer_type({DTYPES[plane.scale_dtype]}))",
        f"value = u * tl.load(scales + k // {plane.group}, {load}).to(tl.float32)",
    ]
    if plane.minimum_dtype:
        pointer = f"tl.pointer_type({DTYPES[plane.minimum_dtype]})"
        lines.append(f"minimums = (row + {plane.minimum_begin}).to({pointer})")
        minimum = f"tl.load(minimums + k // {plane.group}, {load}).to(tl.float32)"
        lines.append(f"value = value - {minimum}")
    lines.append(f"tl.store({to} + k, value, mask=k < {plane.depth})")
    head = signature(symbol, spec.operands, ("BLOCK",))
    kernel = "\n".join([*head, *(f"    {line}" for line in lines)])
    grid = f"{python_dim(ids.shape[0])} * {pieces}"
    launch = Launch(symbol, grid, (("BLOCK", BLOCK),), fused=False)
    comment = [f"quantized_embedding: {spec.form.name}", *(f"  {layout(o)}" for o in spec.operands)]
    text = module_text(comment, spec.operands, [kernel], [Variant(None, (launch,))])
    return KernelSource(
        "quantized_embedding", symbol, "triton", text, len(spec.operands), (), spec.lines
    )
