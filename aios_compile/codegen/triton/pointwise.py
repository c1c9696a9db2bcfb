"""out[i] = f(inputs at i) for a PointwiseSpec; the same spec as the C++ emitter's.

Layout: any strides. Bytes moved: each operand once. Grid: one program for BLOCK elements of a row.
"""

from __future__ import annotations

from torch import Tensor

from aios_compile.codegen.cpp import pointwise
from aios_compile.codegen.cpp.pointwise import PointwiseSpec
from aios_compile.codegen.expression import Printer
from aios_compile.codegen.linear_index import product
from aios_compile.codegen.naming import layout, symbol_of
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.dialect import Texts, Triton, coordinates, module
from aios_compile.codegen.triton.frame import python_dim

BLOCK = 1024

spec_of = pointwise.spec_of


def reference(spec: PointwiseSpec, *tensors: Tensor) -> list[Tensor]:
    """Compute the outputs in torch from the spec alone."""
    return pointwise.reference(spec, *tensors)


def emit(spec: PointwiseSpec) -> KernelSource:
    """Return the kernel module. Raises CodegenError for an operation that Triton lacks."""
    symbol, inner = symbol_of(spec.name, spec), len(spec.shape) - 1
    size = python_dim(spec.shape[-1])
    lines = ["item = tl.program_id(0).to(tl.int64)"]
    lines += [f"pieces = ({size} + BLOCK - 1) // BLOCK", "row = item // pieces"]
    lines += coordinates(spec.shape, "row")
    lines += [f"i{inner} = (item % pieces) * BLOCK + tl.arange(0, BLOCK)"]
    for variant in spec.variants:
        conditions = [f"(i{inner} < {size})"]
        for dim, (low, high) in enumerate(variant.ranges):
            conditions += [f"(i{dim} >= {low})"] if low else []
            conditions += [f"(i{dim} < {high})"] if high is not None else []
        lines.append(f"mask = {' & '.join(conditions)}")
        texts = Texts(spec.operands, variant.leaves, inner, {})
        body, results = Printer(Triton()).statements(variant.values, texts.loads(variant.values))
        lines += body
        for operand, address, result in zip(spec.outputs(), variant.stores, results):
            lines.append(texts.store(operand, address, result))
    rows = python_dim(product(spec.shape[:-1]))
    text = module(
        symbol,
        [f"{spec.name}: pointwise", *(f"  {layout(o)}" for o in spec.operands)],
        spec.operands,
        lines,
        f"{rows} * (({size} + {BLOCK - 1}) // {BLOCK})",
        (BLOCK,),
    )
    return KernelSource(
        spec.name, symbol, "triton", text, len(spec.operands), pointwise.inplace(spec),
        spec.model_lines,
    )  # fmt: skip
