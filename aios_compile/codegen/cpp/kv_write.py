"""Write k[T, G, D] and v[T, G, Dv] to their slots of the paged caches, in place.

k_cache[page, g, d, offset] = k[t, g, d] (transposed: a page's keys are one vector) and
v_cache[page, g, offset, :] = v[t, g, :], page = slots[t] / page size, rounded once to the cache's
dtype, or as int8 codes with a scale a token and head. Layouts, bytes and items: see head_rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from aios_compile.codegen.cpp import head_rows, qk_norm_rope_kv_write
from aios_compile.codegen.cpp.head_rows import HeadRowsSpec
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> HeadRowsSpec | None:
    """Return the spec of a body that is one aios.kv_write, else None."""
    spec = qk_norm_rope_kv_write.spec_of(body, operands)
    if spec is None or spec.q is not None or spec.k is None:
        return None
    return spec if spec.k.eps is None and not spec.k.rotated else None


def reference(spec: HeadRowsSpec, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Compute the caches after the write in eager PyTorch; tensors in the op's order."""
    import torch

    aios = torch.ops.aios
    op = aios.kv_write if len(tensors) == 5 else aios.quantized_kv_write
    return tuple(op.default(*tensors))


def emit(spec: HeadRowsSpec) -> KernelSource:
    """Return the kernel's text."""
    return head_rows.emit(spec)
