"""q_out = rope(norm(q)); caches[slots] = rope(norm(k)), v: all between projection and attention.

Norms and rotation are optional each. q, k and v are slices of the merged projection; the caches are
updated in place. Layouts and bytes: head_rows.py. Grid: (tokens / BLOCK_T, heads of q, k and v).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from aios_compile.codegen.cpp import qk_norm_rope_kv_write
from aios_compile.codegen.cpp.head_rows import HeadRowsSpec
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import head_rows
from aios_compile.codegen.triton.cards import DEFAULT, Card
from aios_compile.codegen.triton.template import Bound


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> Bound[HeadRowsSpec] | None:
    """Return the spec of a body whose outputs are the caches and at most one q, else None."""
    return head_rows.bind(qk_norm_rope_kv_write.spec_of(body, operands), operands)


def reference(
    spec: Bound[HeadRowsSpec], body: fx.GraphModule, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Compute the outputs in eager PyTorch: the body itself is the definition of correct."""
    return qk_norm_rope_kv_write.reference(spec.spec, body, *tensors)


def emit(spec: Bound[HeadRowsSpec], card: Card = DEFAULT) -> KernelSource:
    """Return the kernel module for a card."""
    return head_rows.emit(spec, card)
