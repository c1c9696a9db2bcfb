"""out[p, n] = sum_k q(x)[p // A, k] * w[experts[p], n, k] + bias[experts[p], n]; A choices a token.

The product of a mixture of experts whose matrices are quantised. w[E, N, row_bytes] is packed as
quant16 (codegen/packing.py), the blocks of one expert behind those of the one before, so N is a
multiple of 16; x float32, K dense. Tokens, tiles and the order of the sum are those of
quantized_linear.py: a row has the same bits for every T, tile, split and target. Bytes: each chosen
expert's matrix once for up to 8 tokens that chose it (4 on AVX2), again from the cache for more;
experts that nobody chose not at all. Items: tokens to prepare (one token is prepared by whoever
multiplies), then (panel of blocks, chosen expert); an item looks for its rows in `experts`.
Measured, 32 experts of [1536, 2048], 8 a token, one core of Zen 4, against the kernel of bf16: 1
token 2.8x as fast in 8 bits (24 GB/s) and 4.9x in 4, 8 tokens 2.9x and 5.3x, 64 tokens 3.3x, 3.8x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.codegen.access import outputs
from aios_compile.codegen.cpp import quantized_linear
from aios_compile.codegen.cpp.expert_linear import FLOATS, view_pointer
from aios_compile.codegen.cpp.template import (
    constants,
    kernel,
    number,
    pointer,
    template_text,
)
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import Strided, body_lines, resolve
from aios_compile.ir.quant_format import QuantFormat

STORE = """\
AIOS_INLINE void epilogue(const Sizes* n, void* const* p, int64_t i, int64_t begin, int64_t end,
                          const float* sums, const float*) {
  const int64_t expert = expert_of<E>(load1(expert_at(n, p, i)));
  for (int64_t c = begin; c < end; ++c) {
    float sum = sums[c - begin];
    if constexpr (HAS_BIAS) sum += load1(bias_at(n, p, expert, c));
    store1(out_row(n, p, i) + c * out_step(n), sum);
  }
}"""


@dataclass(frozen=True)
class QuantizedExpertLinearSpec:
    """Everything the text depends on. depth: the K values of a row."""

    x: Strided
    weight: Strided
    experts: Strided
    bias: Strided | None
    out: Operand
    form: QuantFormat
    depth: int
    lines: tuple[str, ...] = ()


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> QuantizedExpertLinearSpec | None:
    """Return the spec of a body that is one aios.quantized_expert_linear, else None."""
    results = outputs(body)
    node: Any = results[0]
    if len(results) != 1 or node.target is not torch.ops.aios.quantized_expert_linear.default:
        return None
    x, weight, experts = (resolve(a, operands) for a in node.args[:3])
    form, given = QuantFormat.parse(str(node.args[3])), (*node.args, None)[4]
    bias = resolve(given, operands)
    if x is None or weight is None or experts is None or (given is not None and bias is None):
        return None
    depth, counts = x.operand.shape[-1], weight.operand.shape
    if x.operand.dtype != "f32" or x.operand.strides[-1] != 1 or not isinstance(depth, int):
        return None
    if bias is not None and bias.operand.dtype not in FLOATS:
        return None
    if not all(isinstance(d, int) for d in counts) or experts.operand.dtype not in ("i64", "i32"):
        return None
    if form.is_float or weight.operand.packed != f"quant16.{form.name}" or weight.offset != 0:
        return None
    out, lines = operands[-1], body_lines(body)
    if out.dtype != "f32":
        return None
    return QuantizedExpertLinearSpec(x, weight, experts, bias, out, form, depth, lines)


def reference(spec: QuantizedExpertLinearSpec, body: fx.GraphModule, *tensors: Tensor) -> Any:
    """Compute the output in eager PyTorch from unpacked rows: the body is the definition."""
    return body(*tensors)


def emit(spec: QuantizedExpertLinearSpec) -> KernelSource:
    """Return the kernel's text: the templates of the quantised linear, then what experts add."""
    experts, columns, _ = spec.weight.operand.shape
    assert isinstance(experts, int) and isinstance(columns, int)
    views = [spec.x, spec.weight, spec.experts, *([spec.bias] if spec.bias else [])]
    out = max(v.index for v in views) + 1
    words = quantized_linear.prepared_words(spec.form, spec.depth)
    codes = Operand(spec.weight.operand.name, "u8", (), ())
    tokens = spec.x.operand.shape[0]
    definitions = [
        *quantized_linear.format_definitions(spec.form, spec.depth),
        constants(K=spec.depth, COLUMNS=columns, STREAMS=1, WORDS=words),
        constants(E=experts, HAS_BIAS=spec.bias is not None),
        number("num_tokens", tokens),
        number("num_pairs", spec.experts.operand.shape[0]),
        number("out_step", spec.out.strides[-1]),
        view_pointer("x_row", spec.x, ("t",)),
        pointer("weight", spec.weight.index, codes, ()),
        view_pointer("expert_at", spec.experts, ("i",)),
        pointer("out_row", out, spec.out, ("i",)),
        f"AIOS_INLINE void* workspace(void* const* p) {{ return p[{out + 1}]; }}",
        *([view_pointer("bias_at", spec.bias, ("e", "i"))] if spec.bias else [NO_BIAS]),
        STORE,
        *quantized_linear.order_definitions(None),
        template_text("quantized_linear"),
    ]
    source = kernel(
        "quantized_expert_linear",
        spec,
        definitions,
        out + 1,
        lines=spec.lines,
        headers=("tiles.h", "quantized.h", "experts.h"),
        finishes=True,
    )
    prepared = Operand("prepared", "f32", (tokens, words), (words, 1))
    return dataclasses.replace(source, workspace=(prepared,))


NO_BIAS = "const float* bias_at(const Sizes*, void* const*, int64_t, int64_t);"
