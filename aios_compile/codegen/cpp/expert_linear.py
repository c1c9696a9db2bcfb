"""out[p, n] = sum over k of x[p // A, k] * weight[experts[p], n, k] + bias[experts[p], n].

The matrix product of a mixture of experts; A choices a token. Layout: weight [E, N, K] as stored
(f32, bf16, f16), read in place by expert; x and out float32, K dense. Bytes: each chosen expert's
matrix once for up to TILE tokens that chose it (again from the cache for more), experts that nobody
chose not at all. Items: (block of columns, expert), so that neighbouring items read different
experts; an item looks for its rows in `experts`. Order of the sum: lane l adds k = l, l + VL, ...,
then the lanes as a tree: the same for every T, tile and thread. An id out of range is clamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.codegen.access import outputs
from aios_compile.codegen.cpp.template import C_TYPES, constants, kernel, number, pointer
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import Strided, body_lines, resolve

COLUMNS = 32  # of one item: 128 KB of bf16 at K = 2048, which stays in the second-level cache
FLOATS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class ExpertLinearSpec:
    """Everything the text depends on."""

    x: Strided
    weight: Strided
    experts: Strided
    bias: Strided | None
    out: Operand
    lines: tuple[str, ...] = ()


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> ExpertLinearSpec | None:
    """Return the spec of a body that is one aios.expert_linear, else None."""
    results = outputs(body)
    node: Any = results[0]
    if len(results) != 1 or node.target is not torch.ops.aios.expert_linear.default:
        return None
    x, weight, experts = (resolve(a, operands) for a in node.args[:3])
    given = node.args[3] if len(node.args) > 3 else None
    bias = resolve(given, operands)
    if x is None or weight is None or experts is None or (given is not None and bias is None):
        return None
    dense = [x, weight] if bias is None else [x, weight, bias]
    if any(v.operand.dtype not in FLOATS or v.operand.strides[-1] != 1 for v in dense):
        return None
    if not all(isinstance(d, int) for d in weight.operand.shape):
        return None
    if operands[-1].dtype != "f32" or experts.operand.dtype not in ("i64", "i32"):
        return None
    return ExpertLinearSpec(x, weight, experts, bias, operands[-1], body_lines(body))


def reference(spec: ExpertLinearSpec, *tensors: Tensor) -> Tensor:
    """Compute the output in torch; tensors are the op's inputs in its order."""
    result: Tensor = torch.ops.aios.expert_linear.default(*tensors)
    return result


def emit(spec: ExpertLinearSpec) -> KernelSource:
    """Return the kernel's text."""
    experts, columns, inner = spec.weight.operand.shape
    assert isinstance(experts, int) and isinstance(columns, int) and isinstance(inner, int)
    views = [spec.x, spec.weight, spec.experts, *([spec.bias] if spec.bias else [])]
    out = max(v.index for v in views) + 1
    bias = spec.bias or spec.weight
    definitions = [
        constants(
            E=experts, N=columns, K=inner, COLUMNS=min(COLUMNS, columns), HAS_BIAS=bool(spec.bias)
        ),
        f"using Weight = {C_TYPES[spec.weight.operand.dtype]};",
        f"using X = {C_TYPES[spec.x.operand.dtype]};",
        number("num_rows", spec.x.operand.shape[0]),
        number("num_pairs", spec.experts.operand.shape[0]),
        view_pointer("x_row", spec.x, ("m",)),
        view_pointer("weight_row", spec.weight, ("e", "i")),
        view_pointer("expert_at", spec.experts, ("i",)),
        view_pointer("bias_at", bias, ("e", "i")),
        pointer("out_row", out, spec.out, ("i",)),
        number("out_step", spec.out.strides[-1]),
    ]
    return kernel(
        "expert_linear", spec, definitions, out + 1, lines=spec.lines, headers=("experts.h",)
    )


def view_pointer(name: str, view: Strided, indices: Sequence[str]) -> str:
    """Return the C function that gives the address of an element of a view."""
    return pointer(name, view.index, view.operand, indices, view.offset)
