"""The Triton target: one emitter a file, in this order (templates first, general ones last)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import (
    embedding,
    expert_linear,
    fp8_linear,
    kv_write,
    kv_write_attention,
    linear,
    matmul,
    paged_attention,
    pointwise,
    qk_norm_rope_kv_write,
    quantized_embedding,
    quantized_linear,
    rope,
    row_reduction,
    sample,
    topk,
)
from aios_compile.codegen.triton.cards import DEFAULT, Card
from aios_compile.codegen.triton.choice import Tuning
from aios_compile.codegen.triton.dependent_launch import with_dependent_launch


@dataclass(frozen=True)
class ForCard:
    """An emitter for a card: its configurations, and dependent launches where the card has them."""

    emitter: Any
    card: Card
    tuning: Tuning | None = None

    def spec_of(self, *arguments: Any) -> Any:
        """Return the emitter's spec."""
        return self.emitter.spec_of(*arguments)

    def emit(self, spec: Any) -> KernelSource:
        """Return the module with the configurations for the card."""
        chosen: dict[str, Any] = {"card": self.card} if self.emitter in BY_CARD else {}
        if self.emitter in TUNED:
            chosen["tuning"] = self.tuning
        name = self.emitter.__name__.rpartition(".")[2]
        source: KernelSource = replace(self.emitter.emit(spec, **chosen), emitter=name)
        return with_dependent_launch(source) if self.card.dependent_launch else source


EMITTERS: tuple[ModuleType, ...] = (
    embedding,
    quantized_embedding,
    linear,
    quantized_linear,
    fp8_linear,
    expert_linear,
    kv_write_attention,
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

BY_CARD = (
    linear, quantized_linear, fp8_linear, kv_write_attention, paged_attention, kv_write,
    qk_norm_rope_kv_write,
)  # fmt: skip
TUNED = (linear, quantized_linear, fp8_linear, kv_write_attention, paged_attention, sample)


def emitters_for(card: Card = DEFAULT, tuning: Tuning | None = None) -> Sequence[Any]:
    """Return the emitters for a card. tuning: lets the compiler report on linears' candidates."""
    return [ForCard(e, card, tuning) for e in EMITTERS]
