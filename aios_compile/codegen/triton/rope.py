"""out = x * cos + rotate(x) * sin on the first R elements of each head; R..D pass through.

Both pairings of elements: halves (GPT-NeoX, Llama) and neighbours (GPT-J). RoFormer (Su et al.,
2021). Layouts and bytes: head_rows.py. Grid: (tokens / BLOCK_T, heads).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from aios_compile.codegen.cpp import rope
from aios_compile.codegen.cpp.head_rows import HeadRowsSpec
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import head_rows
from aios_compile.codegen.triton.template import Bound


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> Bound[HeadRowsSpec] | None:
    """Return the spec of a body that is one aios.rope, else None."""
    return head_rows.bind(rope.spec_of(body, operands), operands)


def reference(spec: Bound[HeadRowsSpec], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute the kernel's output in eager PyTorch."""
    return rope.reference(spec.spec, x, cos, sin)


def emit(spec: Bound[HeadRowsSpec]) -> KernelSource:
    """Return the kernel module."""
    return head_rows.emit(spec)
