"""The last kernel of a step: gather the sampled rows into one run of bytes, copied in one go.

In: the outputs of the program but for the logits, i64 or f32, [R] or [R, n]. Out: one block, the
8-byte outputs first, each [R, n] behind the other (codegen/step_results.py). One program a row.
Bytes: each value once in, once out.
"""

from __future__ import annotations

from aios_compile.codegen.naming import symbol_of, variable
from aios_compile.codegen.operand import BYTES, Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.step_results import StepResults
from aios_compile.codegen.triton.frame import Launch, Variant, module_text, signature

NAME = "collect_results"


def emit(spec: StepResults) -> KernelSource:
    """Return the module; operands: the outputs in the spec's order, the block as i64 and as f32."""
    symbol = symbol_of(NAME, spec)
    operands = [Operand(name, dtype, (1,), (1,)) for name, dtype, _ in spec.outputs]
    wide, narrow = len(operands), len(operands) + 1
    operands += [Operand("block", "i64", (1,), (1,)), Operand("block", "f32", (1,), (1,))]
    lines, end = ["r = tl.program_id(0).to(tl.int64)"], 0
    for i, (_, dtype, width) in enumerate(spec.outputs):
        size, target = BYTES[dtype], wide if dtype == "i64" else narrow
        block = 1 << (width - 1).bit_length()
        lines += [f"lane = tl.arange(0, {block})", f"inside = lane < {width}"]
        value = f"tl.load({variable(operands[i], i)} + r * {width} + lane, mask=inside)"
        place = f"{variable(operands[target], target)} + {end // size} * R + r * {width} + lane"
        lines.append(f"tl.store({place}, {value}, mask=inside)")
        end += size * width
    kernel = "\n".join([*signature(symbol, operands), *(f"    {line}" for line in lines)])
    launch = Launch(symbol, "R", (), 1, 1)
    comment = ["collect_results: the sampled rows in one block"]
    text = module_text(comment, operands, [kernel], [Variant(None, (launch,))])
    return KernelSource(NAME, symbol, "triton", text, len(operands))
