"""How a module's forward takes tokens and positions: by which names, and what else it must get.

forward(input_ids, position_ids) is called so. Others name their tokens otherwise (nanoGPT's idx,
torchtune's tokens) or count the positions themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from aios_compile.errors import CaptureError

TOKENS, POSITIONS = "input_ids", "position_ids"
# Names of the field's modules; tokens of any name come first, or they are looked for by these.
TOKEN_NAMES = (TOKENS, "idx", "tokens", "token_ids", "input_tokens", "ids")
POSITION_NAMES = (POSITIONS, "positions", "position", "input_pos", "pos", "pos_ids")


@dataclass(frozen=True)
class CallConvention:
    """The names of the tokens and of the positions (None: it counts them itself)."""

    tokens: str
    positions: str | None

    def arguments(self, tokens: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Return the keyword arguments of a forward of these tokens, both [T] or [1, T]."""
        given = {self.tokens: tokens}
        if self.positions is not None:
            given[self.positions] = positions
        return given


def call_convention(model: nn.Module) -> CallConvention:
    """Return how to call `model`. Raises CaptureError where no argument can be the tokens, or where
    forward asks for more than tokens and positions.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**{TOKENS: None, POSITIONS: None})
        return CallConvention(TOKENS, POSITIONS)
    except TypeError:
        pass
    named = [p for p in signature.parameters.values() if p.kind not in _UNNAMED]
    required = [p.name for p in named if p.default is Parameter.empty]
    names = [p.name for p in named]
    known = [name for name in TOKEN_NAMES if name in names]
    first = next((name for name in names if name not in POSITION_NAMES), None)
    tokens = known[0] if known else first
    positions = next((name for name in POSITION_NAMES if name in names), None)
    missing = [name for name in required if name not in (tokens, positions)]
    if tokens is None or missing:
        more = f", and nothing is known of {', '.join(missing)}" if missing else ""
        raise CaptureError(
            f"forward of {type(model).__name__} takes ({', '.join(signature.parameters)}), "
            f"expected ({TOKENS}, {POSITIONS}){more}",
            advice="wrap it in an nn.Module with that forward, or give the others defaults",
        )
    return CallConvention(tokens, positions)


_UNNAMED = (Parameter.POSITIONAL_ONLY, Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def logits_in(result: Any) -> Any:
    """Return what a model means by its logits: by name, else the first of several results."""
    if isinstance(result, Mapping):
        return result.get("logits", result)
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    return getattr(result, "logits", first)


def without_last_token(shape: Sequence[Any], index: Any) -> bool:
    """Return whether x[index] of a tensor of `shape` is the last of a symbolic dimension, all else
    as it is: x[:, [-1], :], x[:, -1:], x[:, -1].
    """
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is None for item in items):
        return False
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    taken = [d for d, item in enumerate(items) if item != slice(None)]
    if len(taken) != 1:
        return False
    last = items[taken[0]] in (-1, [-1], slice(-1, None), slice(-1, None, None))
    return last and isinstance(shape[taken[0]], torch.SymInt)
