"""Adapters for modules that were not written for this compiler: Hugging Face causal LMs.

Their attention is redirected to `aios::attention` through transformers' own registries, so that no
dense mask enters the graph; everything else is captured as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from aios_compile.errors import UnsupportedModelError

_KNOWN_ARGUMENTS = {"dropout", "position_ids", "output_attentions", "use_cache", "cache_position"}


def is_hugging_face(model: nn.Module) -> bool:
    """Return whether a model comes from transformers, without importing it."""
    return any(c.__module__ == "transformers.modeling_utils" for c in type(model).__mro__)


@contextlib.contextmanager
def adapted(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Yield (module to trace, extra keyword arguments) and undo every change afterwards."""
    if not is_hugging_face(model):
        yield model, {}
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("aios", _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("aios", _no_mask)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: getattr(c, "_attn_implementation", None) for key, c in configs.items()}
    for config in configs.values():
        config._attn_implementation = "aios"
    try:
        yield _LogitsOnly(model), {}
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


class _LogitsOnly(nn.Module):
    """forward(input_ids, position_ids) -> logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.named_buffers(*args, **kwargs)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend query [1, H, T, D] to key and value [1, G, T, D]; return [1, T, H, Dv]."""
    unknown = {
        k
        for k, v in others.items()
        if k not in _KNOWN_ARGUMENTS and v is not None and v is not False
    }
    unknown -= {"is_causal"} if others.get("is_causal", True) else set()
    if unknown or not getattr(module, "is_causal", True) or attention_mask is not None:
        what = ", ".join(sorted(unknown)) or "a mask or a bidirectional layer"
        raise UnsupportedModelError(f"attention of {type(module).__name__} with {what}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.ops.aios.attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale,
        sliding_window,
        softcap,
        None,
        s_aux,
    )
    return out[None], None
