"""The Triton target: one emitter a file, in this order (templates first, general ones last)."""

from __future__ import annotations

from types import ModuleType

from aios_compile.codegen.triton import (
    embedding,
    kv_write,
    linear,
    matmul,
    paged_attention,
    pointwise,
    qk_norm_rope_kv_write,
    rope,
    row_reduction,
    sample,
)

EMITTERS: tuple[ModuleType, ...] = (
    embedding,
    linear,
    paged_attention,
    qk_norm_rope_kv_write,
    kv_write,
    rope,
    row_reduction,
    sample,
    matmul,
    pointwise,
)
