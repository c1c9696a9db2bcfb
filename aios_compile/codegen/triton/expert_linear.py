"""out[p, n] = sum over k of x[p // A, k] * weight[experts[p], n, k] + bias[experts[p], n].

The spec is the C++ target's (its file has the layouts); A choices a token. A program has some
columns of one expert and looks for the pairs that chose it, so no sorted list is made before and
the grid does not depend on what was chosen. Factors as in linear.py: float32 x beside half weights
in two parts. Order of the sum: ascending k in a block's products, the same for every pair of a
variant. Bytes: each chosen expert's matrix once for up to BLOCK_P pairs (again from L2 for more),
experts that nobody chose not at all; the list once a program. Grid: (blocks of columns, experts).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from aios_compile.codegen.cpp import expert_linear
from aios_compile.codegen.cpp.expert_linear import ExpertLinearSpec
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.frame import python_dim
from aios_compile.codegen.triton.linear_text import PRODUCT, factors
from aios_compile.codegen.triton.template import (
    Bound,
    Entry,
    Text,
    fixed,
    is_fixed,
    kernel,
    next_power_of_two,
)

# pairs up to which a variant serves: (pairs of a tile, columns, depth of a step)
VARIANTS: tuple[tuple[int | None, int, int, int], ...] = ((64, 16, 32, 128), (None, 64, 64, 64))
SCAN = 128


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> Bound[ExpertLinearSpec] | None:
    """Return the spec of a body that is one aios.expert_linear, else None."""
    spec = expert_linear.spec_of(body, operands)
    if spec is None:
        return None
    views = [spec.x, spec.weight, spec.experts, *([spec.bias] if spec.bias else [])]
    dims = [d for v in views for d in (v.offset, *v.operand.strides)]
    flat = len(spec.x.operand.shape) == 2 and len(spec.experts.operand.shape) == 1
    return Bound(spec, tuple(operands)) if flat and is_fixed(*dims, *spec.out.strides) else None


def reference(spec: Bound[ExpertLinearSpec], *tensors: Tensor) -> Tensor:
    """Compute the output in torch; tensors are the op's inputs in its order."""
    return expert_linear.reference(spec.spec, *tensors)


def emit(bound: Bound[ExpertLinearSpec]) -> KernelSource:
    """Return the module."""
    spec = bound.spec
    experts, columns, depth = (fixed(d) for d in spec.weight.operand.shape)
    views = {"X": spec.x, "W": spec.weight, "EXPERTS": spec.experts, "B": spec.bias or spec.weight}
    constants = {"E": experts, "N": columns, "K": depth, "SCAN": SCAN, "HAS_BIAS": bool(spec.bias)}
    constants |= {f"{name}_OFFSET": fixed(view.offset) for name, view in views.items()}
    constants |= {
        "X_ROW": fixed(spec.x.operand.strides[0]),
        "W_EXPERT": fixed(spec.weight.operand.strides[0]),
        "W_ROW": fixed(spec.weight.operand.strides[1]),
        "EXPERTS_STEP": fixed(spec.experts.operand.strides[0]),
        "B_EXPERT": fixed(views["B"].operand.strides[0]),
        "B_STEP": fixed(views["B"].operand.strides[1]),
        "OUT_ROW": fixed(spec.out.strides[0]),
        "OUT_STEP": fixed(spec.out.strides[1]),
    }
    pairs = spec.experts.operand.shape[0]
    sizes = (python_dim(spec.x.operand.shape[0]), python_dim(pairs))
    indices = [views[name].index for name in ("X", "W", "EXPERTS", "B")]
    variants = []
    for most, block_p, block_n, block_k in VARIANTS:
        block_k = min(block_k, next_power_of_two(depth, 16))
        blocks = (("BLOCK_P", block_p), ("BLOCK_N", block_n), ("BLOCK_K", block_k))
        grid = f"{-(-columns // block_n)}, {experts}"
        arguments: tuple[int | str, ...] = (*indices, len(bound.operands) - 1, *sizes)
        variants.append((most, [Entry("expert_tiles", arguments, grid, blocks)]))
    return kernel(
        "expert_linear", bound, ["expert_linear: one program for some columns of an expert"],
        bound.operands, constants, [Text(PRODUCT), _multiply(spec), "expert_linear"], variants,
        pairs, lines=spec.lines,
    )  # fmt: skip


def _multiply(spec: ExpertLinearSpec) -> Text:
    """Return the function of the product of a block of weights with a block of activations."""
    factor, split, precision = factors(spec.x.operand.dtype, spec.weight.operand.dtype)
    parts = [line.split(" ")[0] for line in split if line.startswith("x")]
    lines = ["@triton.jit", "def multiply(rows, x, sums):", *(f"    {line}" for line in split)]
    lines += [f"    rows = rows.to(tl.{factor})"]
    lines += [f'    sums = product(rows, {part}, sums, "{precision}")' for part in parts]
    return Text("\n".join([*lines, "    return sums"]))
