"""Reductions over one dimension with prologue and epilogue, for a RowReductionSpec.

Layout: any strides. Bytes moved: each operand once: a row is held whole in registers, so the block
is the power of two that holds it, at most 65,536; rows of a runtime size have a binary for each of
a few blocks. Grid: one program a row.
"""

from __future__ import annotations

from torch import Tensor

from aios_compile.codegen.access import Reduction
from aios_compile.codegen.cpp import row_reduction
from aios_compile.codegen.cpp.row_reduction import RowReductionSpec
from aios_compile.codegen.expression import FLOATS, Printer
from aios_compile.codegen.linear_index import product
from aios_compile.codegen.naming import layout, symbol_of
from aios_compile.codegen.operand import Dim
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.dialect import Texts, Triton, coordinates, module
from aios_compile.codegen.triton.frame import python_dim
from aios_compile.errors import CodegenError

START = {"sum": "0", "max": 'float("-inf")', "min": 'float("inf")'}
START["prod"] = "1"
RUNTIME_BLOCKS = (256, 1024, 4096, 16384, 65536)
WHOLE_START = {"sum": "0", "prod": "1", "max": str(-(2**63)), "min": str(2**63 - 1)}
MADE = {"prod": "product_of", "max": "largest_of", "min": "smallest_of"}  # functions.py.txt
FLAG_START = {"max": "0", "min": "1"}

spec_of = row_reduction.spec_of


def reference(spec: RowReductionSpec, *tensors: Tensor) -> list[Tensor]:
    """Compute the outputs in torch from the spec alone."""
    return row_reduction.reference(spec, *tensors)


def emit(spec: RowReductionSpec) -> KernelSource:
    """Return the kernel module. Raises CodegenError for what Triton lacks."""
    symbol, inner = symbol_of(spec.name, spec), len(spec.shape) - 1
    size = python_dim(spec.shape[-1])
    names = {i: f"reduced{i}" for i, x in enumerate(spec.leaves) if isinstance(x, Reduction)}
    texts = Texts(spec.operands, spec.leaves, inner, names)
    printer = Printer(Triton())
    lines = ["item = tl.program_id(0).to(tl.int64)", *coordinates(spec.shape, "item")]
    lines += [f"i{inner} = tl.arange(0, BLOCK).to(tl.int64)", f"mask = i{inner} < {size}"]
    for index, name in names.items():
        leaf = spec.leaves[index]
        assert isinstance(leaf, Reduction)
        body, (value,) = printer.statements([leaf.value], texts.loads([leaf.value]), f"v{index}_")
        lines += [*body, f"{name} = {_reduced(leaf, value)}"]
    values = [r.value for r in spec.results]
    body, results = printer.statements(values, texts.loads(values))
    lines += body
    for number, (result, text) in enumerate(zip(spec.results, results)):
        lines.append(texts.store(spec.first_output() + number, result.store, text))
    text = module(
        symbol,
        [f"{spec.name}: one program a row", *(f"  {layout(o)}" for o in spec.operands)],
        spec.operands,
        lines,
        python_dim(product(spec.shape[:-1])),
        _blocks(spec.shape[-1]),
        spec.shape[-1],
    )
    return KernelSource(
        spec.name, symbol, "triton", text, len(spec.operands), row_reduction.inplace(spec),
        spec.model_lines,
    )  # fmt: skip


def _reduced(leaf: Reduction, value: str) -> str:
    """Return the text of one reduction. Raises CodegenError for one that the target lacks."""
    flags = leaf.value.dtype == "bool"
    starts = FLAG_START if flags else START if leaf.value.dtype in FLOATS else WHOLE_START
    kind = leaf.kind.removeprefix("arg")
    if kind not in starts:
        raise CodegenError(f"the Triton target has no {leaf.kind} over {leaf.value.dtype}")
    given = f"tl.where(mask, {value}, {starts[kind]})"
    if flags:
        given = f"{given}.to(tl.int32)"
    functions = MADE if leaf.value.dtype in FLOATS else {"prod": MADE["prod"]}
    function = functions.get(leaf.kind)
    text = f"{function}({given})" if function else f"tl.{leaf.kind}({given}, 0)"
    return f"({text} != 0)" if flags and leaf.kind == kind else text


def _blocks(size: Dim) -> tuple[int, ...]:
    """Return the blocks that rows of this size need. Raises CodegenError for rows too long."""
    if not isinstance(size, int):
        return RUNTIME_BLOCKS
    if size > RUNTIME_BLOCKS[-1]:
        raise CodegenError(f"the Triton target holds rows of {RUNTIME_BLOCKS[-1]}, got {size}")
    return (1 << max(0, size - 1).bit_length(),)
