"""Schema, fake and reference of `aios::sample`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_LOGPROBS = 20

# name -> (C type, sizes); the order is the order of the op's arguments after `logits`.
INPUTS: dict[str, tuple[torch.dtype, str]] = {
    "temperature": (torch.float32, "R"),
    "top_k": (torch.int64, "R"),
    "top_p": (torch.float32, "R"),
    "min_p": (torch.float32, "R"),
    "seeds": (torch.int64, "R"),
    "sample_positions": (torch.int64, "R"),
    "repetition_penalty": (torch.float32, "R"),
    "presence_penalty": (torch.float32, "R"),
    "frequency_penalty": (torch.float32, "R"),
    "penalty_starts": (torch.int64, "R+1"),
    "penalty_ids": (torch.int64, "NP"),
    "penalty_counts": (torch.int64, "NP"),
    "bias_starts": (torch.int64, "R+1"),
    "bias_ids": (torch.int64, "NB"),
    "bias_values": (torch.float32, "NB"),
    "allowed_starts": (torch.int64, "R+1"),
    "allowed_ids": (torch.int64, "NA"),
    "logprob_counts": (torch.int64, "R"),
    "given_ids": (torch.int64, "R"),
    "has_given": (torch.int64, "R"),
}

_RESULT = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
SCHEMA = f"(Tensor logits, {', '.join('Tensor ' + name for name in INPUTS)}) -> {_RESULT}"


def reference(logits: Tensor, *inputs: Tensor) -> Any:
    from aios_compile.ir import sample_reference

    return sample_reference.sample(logits, *inputs)


def fake(logits: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, MAX_LOGPROBS, dtype=torch.int64),
        logits.new_empty(rows, MAX_LOGPROBS, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int64),
    )
