"""out = x * cos + rotate(x) * sin on the first R elements of each head; R..D pass through.

Layouts, bytes and items: see head_rows.py. RoFormer (Su et al., 2021); both pairings of elements:
halves (GPT-NeoX, Llama) and neighbours (GPT-J).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from aios_compile.codegen.cpp import head_rows
from aios_compile.codegen.cpp.head_rows import HeadRowsSpec
from aios_compile.codegen.cpp.qk_norm_rope_kv_write import rotation_of, single_output
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import body_lines, resolve


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> HeadRowsSpec | None:
    """Return the spec of a body that is one aios.rope, else None."""
    node = single_output(body)
    if node is None or node.target is not torch.ops.aios.rope.default:
        return None
    source = head_rows.three_dimensional(resolve(node.args[0], operands))
    rotation = rotation_of(node, operands)
    if source is None or rotation is None:
        return None
    head = head_rows.Head(source, rotated=True)
    out = (len(operands) - 1, operands[-1])
    count = len(operands)
    spec = HeadRowsSpec("rope", head, out, None, None, rotation, count, count - 1, body_lines(body))
    return spec if head_rows.fits(spec) else None


def reference(spec: HeadRowsSpec, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute the kernel's output in eager PyTorch."""
    assert spec.rotation is not None
    result: Tensor = torch.ops.aios.rope.default(x, cos, sin, spec.rotation.interleaved)
    return result


def emit(spec: HeadRowsSpec) -> KernelSource:
    """Return the kernel's text."""
    return head_rows.emit(spec)
