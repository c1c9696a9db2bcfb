"""The C++ target: one emitter a file, tried in this order (templates first, general ones last)."""

from __future__ import annotations

from types import ModuleType

from aios_compile.codegen.cpp import (
    embedding,
    expert_linear,
    kv_write,
    linear,
    matmul,
    paged_attention,
    pointwise,
    qk_norm_rope_kv_write,
    quantized_embedding,
    quantized_expert_linear,
    quantized_linear,
    rope,
    row_reduction,
    sample,
    topk,
)

EMITTERS: tuple[ModuleType, ...] = (
    embedding,
    linear,
    expert_linear,
    quantized_linear,
    quantized_expert_linear,
    quantized_embedding,
    paged_attention,
    qk_norm_rope_kv_write,
    kv_write,
    rope,
    row_reduction,
    sample,
    topk,
    matmul,
    pointwise,
)
