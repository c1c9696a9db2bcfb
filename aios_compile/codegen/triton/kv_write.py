"""Write k[T, G, D] and v[T, G, Dv] to their slots of the paged caches, in place.

k_cache[page, g, d, offset] = k[t, g, d] and v_cache[page, g, offset, :] = v[t, g, :], page =
slots[t] / page size, rounded once to the cache's dtype, or as codes with a scale a token and
head. Layouts and bytes: head_rows.py. Grid: (tokens / BLOCK_T, 2 * key/value heads).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from aios_compile.codegen.cpp import kv_write
from aios_compile.codegen.cpp.head_rows import HeadRowsSpec
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import head_rows
from aios_compile.codegen.triton.cards import DEFAULT, Card
from aios_compile.codegen.triton.template import Bound


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> Bound[HeadRowsSpec] | None:
    """Return the spec of a body that is one aios.kv_write, else None."""
    return head_rows.bind(kv_write.spec_of(body, operands), operands)


def reference(spec: Bound[HeadRowsSpec], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Compute the caches after the write in eager PyTorch; tensors in the op's order."""
    return kv_write.reference(spec.spec, *tensors)


def emit(spec: Bound[HeadRowsSpec], card: Card = DEFAULT) -> KernelSource:
    """Return the kernel module for a card."""
    return head_rows.emit(spec, card)
