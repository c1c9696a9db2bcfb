"""One capture a process for equal decoders: it is half of what compiling a tiny model takes.

Tests compile the same few models with many options, and a capture knows of three: the model's
configuration, its dtype, and the most tokens of a step.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from aios_compile.capture import capture as capturing
from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule
from aios_compile.models.decoder import Decoder


def share_captures() -> None:
    """Let captures of this project's decoder, without weights, give copies of one."""
    real, kept = capturing._capture, dict[Any, IRModule]()
    if real.__name__ == "shared":
        return

    def shared(model: nn.Module, flat: bool, max_tokens: int, whole: bool = False) -> IRModule:
        parameters = list(model.parameters())
        weightless = all(p.is_meta or isinstance(p, FakeTensor) for p in parameters)
        if type(model) is not Decoder or not weightless or whole:
            return real(model, flat, max_tokens, whole)
        dtypes = tuple(str(p.dtype) for p in parameters)
        key = (repr(model.config), dtypes, model.training, flat, max_tokens)
        if key not in kept:
            kept[key] = real(model, flat, max_tokens)
        return snapshot.take(kept[key])

    capturing._capture = shared
