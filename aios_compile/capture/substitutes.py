"""What stands for a function of PyTorch while a model is captured, in tensor code.

checkpoint(f, x) is f(x): it says what is kept for a backward pass, and there is none.
flex_attention is attention spelled out: its mask_mod and score_mod, which PyTorch calls for one
query and key at a time, are called with all of them at once. raise_attention reads the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils import checkpoint as checkpointing

from aios_compile.capture import torch_private


@contextlib.contextmanager
def substituted() -> Iterator[None]:
    """Let dynamo trace the functions below instead of PyTorch's."""
    with torch_private.traced_instead(
        {
            checkpointing.checkpoint: _checkpoint,
            flex.flex_attention: _flex_attention,
            flex.create_block_mask: _create_block_mask,
        }
    ):
        yield


def _checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: Any = None,
    context_fn: Any = None,
    determinism_check: Any = None,
    debug: Any = None,
    early_stop: Any = None,
    preserve_rng_state: Any = None,
    **kwargs: Any,
) -> Any:
    return function(*args, **kwargs)


class _Mask:
    """A block mask without blocks: who sees whom is asked where attention is computed."""

    def __init__(self, mask_mod: Any) -> None:
        self.mask_mod = mask_mod


def _create_block_mask(mask_mod: Any, *args: Any, **kwargs: Any) -> _Mask:
    return _Mask(mask_mod)


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Any:
    """Attend query [B, H, Q, D] to key and value [B, G, K, D]; return [B, H, Q, Dv]."""
    if return_lse or return_aux is not None:
        raise NotImplementedError("[refused: flex_attention that returns more than its result]")
    heads = torch.arange(query.shape[1])[None, :, None, None]
    queries = torch.arange(query.shape[2])[None, None, :, None]
    keys = torch.arange(key.shape[2])[None, None, None, :]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    seen = None if block_mask is None else block_mask.mask_mod(zero, heads, queries, keys)
    if score_mod is None:
        return torch.ops.aios.sdpa(query, key, value, seen, False, scale, enable_gqa)
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = score_mod((query @ key.transpose(-1, -2)) * factor, zero, heads, queries, keys)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ value
