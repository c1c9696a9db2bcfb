"""Linear for many tokens by the library that torch calls (cuBLAS, hipBLASLt), as a candidate.

Three launches behind the interface of all others: x is split into parts of the weights' precision
(bf16 weights beside float32 x: two, one behind the other in a planned buffer), the library
multiplies all parts at once into a planned float32 buffer, and a kernel adds the parts and computes
the tail. The library's call can be captured in a graph; it keeps a workspace of its own. Its order
of summation is its own too. Config kind "library"; never chosen by the model, which has not seen it
measured. In the interpreter the product is torch's in float32.
Bytes: x, its parts and the sums once more than a fused kernel.
"""

from __future__ import annotations

from aios_compile.codegen.linear_index import product
from aios_compile.codegen.naming import variable
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.triton.configs import Config
from aios_compile.codegen.triton.frame import Launch, python_dim
from aios_compile.codegen.triton.linear_spec import LinearSpec
from aios_compile.codegen.triton.linear_text import (
    factors,
    kernel_text,
    parts_of,
    space_of,
    tail_lines,
    x_row,
)
from aios_compile.errors import CodegenError

BLOCK = 1024  # elements of a program that splits x, or adds the parts
LIBRARY = '''\
class LibraryProduct:
    """sums[PARTS * T, N] = parts[PARTS * T, K] @ w[N, K].T, launched as a kernel is."""

    def __init__(self, name, places, rows, columns, depth, first, stride):
        self.__name__, self.places, self.rows = name, places, rows
        self.columns, self.depth, self.first, self.stride = columns, depth, first, stride

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *given, **options):
        import torch

        rows = self.rows(*given[-4:])
        parts, weight, sums = (given[place] for place in self.places)
        parts = parts[: rows * self.depth].view(rows, self.depth)
        begin = weight.storage_offset() + self.first
        weight = weight.as_strided((self.depth, self.columns), (1, self.stride), begin)
        out = sums[: rows * self.columns].view(rows, self.columns)
        if parts.dtype == torch.float32:
            torch.mm(parts, weight, out=out)
        elif parts.is_cuda:
            torch.mm(parts, weight, torch.float32, out=out)
        else:
            torch.mm(parts.float(), weight.float(), out=out)'''


def workspace(spec: LinearSpec) -> list[Operand]:
    """Return the buffers: the parts of x, and the sums of all parts.

    Raises CodegenError for float16 weights beside float32 x, which no part of 16 bits holds.
    """
    x = "f32" if spec.norm is not None else spec.x.operand.dtype  # a norm's launch writes float32
    factor, split, _ = factors(x, spec.weight.operand.dtype)
    dtype = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[factor]
    if dtype != spec.weight.operand.dtype:
        raise CodegenError(
            f"{spec.name}: no library multiplies {x} x with {spec.weight.operand.dtype} weights",
            advice="choose a configuration of kind tile",
        )
    tokens = spec.x.operand.shape[0]
    count, columns = _count(split), spec.columns * spec.streams
    return [
        Operand("parts", dtype, (product((count, tokens, spec.depth)),), (1,)),
        Operand("sums", "f32", (product((count, tokens, columns)),), (1,)),
    ]


def _count(split: list[str]) -> int:
    return sum(line.startswith("x") for line in split)


def kernels(
    spec: LinearSpec, operands: list[Operand], config: Config, name: str
) -> tuple[list[str], tuple[Launch, ...]]:
    """Return the functions and the three launches."""
    rows, columns = python_dim(spec.x.operand.shape[0]), spec.columns * spec.streams
    _, split, _ = parts_of(spec)
    parts, sums = space_of(operands, "parts"), space_of(operands, "sums")
    weight = spec.weight
    places = (parts, weight.index, sums)
    stride = weight.operand.strides[0]
    texts = [LIBRARY, kernel_text(f"{name}_split", operands, ("BLOCK",), _split(spec, operands))]
    texts.append(
        f'{name} = LibraryProduct(\n    "{name}", {places}, lambda T, S, R, P: {_count(split)} * '
        f"{rows},\n    {columns}, {spec.depth}, {weight.offset}, {stride},\n)"
    )
    texts.append(kernel_text(f"{name}_tail", operands, ("BLOCK",), _tail(spec, operands)))
    block = (("BLOCK", BLOCK),)
    return texts, (
        Launch(f"{name}_split", f"{rows} * {-(-spec.depth // BLOCK)}", block),
        Launch(name, "1"),
        Launch(f"{name}_tail", f"{rows} * {-(-spec.columns // BLOCK)}", block),
    )


def _split(spec: LinearSpec, operands: list[Operand]) -> list[str]:
    """Return the body that writes the parts of BLOCK elements of a token."""
    blocks, index = -(-spec.depth // BLOCK), space_of(operands, "parts")
    rows, target = python_dim(spec.x.operand.shape[0]), variable(operands[index], index)
    _, split, _ = parts_of(spec)
    lines = [
        f"token = (tl.program_id(0) // {blocks}).to(tl.int64)",
        f"k = tl.program_id(0) % {blocks} * BLOCK + tl.arange(0, BLOCK)",
        f"x = tl.load({x_row(spec, 'token')} + k, mask=k < {spec.depth}, other=0.0)",
        *split,
    ]
    for part in range(_count(split)):
        place = f"{target} + ({part} * {rows} + token) * {spec.depth} + k"
        lines.append(f"tl.store({place}, x{part}, mask=k < {spec.depth})")
    return lines


def _tail(spec: LinearSpec, operands: list[Operand]) -> list[str]:
    """Return the body that adds the parts of BLOCK columns of a token, then the tail."""
    blocks, index = -(-spec.columns // BLOCK), space_of(operands, "sums")
    rows, source = python_dim(spec.x.operand.shape[0]), variable(operands[index], index)
    _, split, _ = parts_of(spec)
    lines = [
        f"i0 = tl.full([1], 0, tl.int64) + tl.program_id(0) // {blocks}",
        f"i1 = tl.program_id(0).to(tl.int64) % {blocks} * BLOCK + tl.arange(0, BLOCK)",
        f"mask0, mask1 = i0 < {rows}, i1 < {spec.columns}",
    ]
    width = spec.columns * spec.streams
    for s in range(spec.streams):
        loads = [
            f"tl.load({source} + ({p} * {rows} + i0) * {width} + {s * spec.columns} + i1, "
            "mask=mask1, other=0.0)"
            for p in range(_count(split))
        ]
        lines.append(f"sum{s} = {' + '.join(loads)}")
    return [*lines, *tail_lines(spec)]
