"""Adapters for modules that were not written for this compiler: Hugging Face causal LMs.

Their attention is redirected to `aios::sdpa` through transformers' own registries. The mask is the
one that transformers would make, as tensor code in the graph. raise_attention runs that code to
find out whether the mask is causal, a window or a chunk; afterwards no dense mask is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# What a config is set to while it is captured: experts as tensor code instead of a loop or an op
# of transformers.
_IMPLEMENTATIONS = {"_attn_implementation": "aios", "_experts_implementation": "batched_mm"}
# Dynamo traces the functions below and cannot make our errors: a reason travels in its message.
_REFUSED, _END = "[refused: ", "]"
# Arguments that change nothing in a forward pass without a cache; is_causal is looked at.
_KNOWN_ARGUMENTS = {
    "dropout",
    "position_ids",
    "output_attentions",
    "use_cache",
    "cache_position",
    "is_causal",
}


def refusal_in(message: str) -> str | None:
    """Return the reason of a refusal from the message of the error that it became, or None."""
    _, found, rest = message.partition(_REFUSED)
    return rest.partition(_END)[0] if found else None


def is_hugging_face(model: nn.Module) -> bool:
    """Return whether a model comes from transformers, without importing it."""
    return any(c.__module__ == "transformers.modeling_utils" for c in type(model).__mro__)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and give every module its own mode back afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def adapted(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Yield (module to trace, extra keyword arguments) and undo every change afterwards."""
    if not is_hugging_face(model):
        yield model, {}
        return
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("aios", _attention)
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register("aios", _mask)
    find_packed = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _one_sequence
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {(key, a): getattr(c, a, None) for key, c in configs.items() for a in _IMPLEMENTATIONS}
    for config in configs.values():
        for attribute, name in _IMPLEMENTATIONS.items():
            setattr(config, attribute, name)
    try:
        yield _LogitsOnly(model), {}
    finally:
        masking_utils.find_packed_sequence_indices = find_packed
        for key, config in configs.items():
            for attribute in _IMPLEMENTATIONS:
                setattr(config, attribute, before[key, attribute])


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


def _one_sequence(position_ids: torch.Tensor) -> None:
    """Say that positions never start again: a step's sequences are told apart by the runtime."""
    return None


def _mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    cache_position: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """Return transformers' mask, additive [1, 1, T, T]: 0 where a query sees a key.

    cache_position: where the queries are, which transformers 4 gives instead of q_length.
    """
    places = torch.arange(q_length) + q_offset if cache_position is None else cache_position
    queries = places[None, None, :, None]
    keys = torch.arange(kv_length)[None, None, None, :] + kv_offset
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    seen = mask_function(zero, zero, queries, keys)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].to(torch.bool)
    return torch.where(seen, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend query [1, H, T, D] to key and value [1, G, T, D]; return [1, T, H, Dv].

    The mask says what a window says too, and who sees whom; a window without a mask would be lost,
    and is refused.
    """
    given = {k for k, v in others.items() if v is not None and v is not False}
    unknown = given - _KNOWN_ARGUMENTS - (set() if attention_mask is None else {"sliding_window"})
    causal = attention_mask is None
    both_ways = causal and not others.get("is_causal", getattr(module, "is_causal", True))
    if unknown or both_ways:
        what = ", ".join(sorted(unknown)) or "tokens that see later ones"
        raise NotImplementedError(
            f"{_REFUSED}attention of {type(module).__name__} with {what}{_END}"
        )
    out = torch.ops.aios.sdpa(
        query, key, value, attention_mask, causal, scaling, True, softcap, s_aux
    )
    return out.transpose(1, 2).contiguous(), None  # as transformers' own: some view it
