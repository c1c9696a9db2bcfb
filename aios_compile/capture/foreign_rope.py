"""Rotary embeddings of Hugging Face whose frequencies the longest sequence chooses.

A step's tokens are of many sequences, so that no length is common to them. transformers' "dynamic"
and "longrope" both keep the frequencies of the trained length up to that length: where no sequence
may become longer, they are plain tables. Where one may, the model is left as it is, and capture or
generation names transformers' line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

LENGTH = "original_max_position_embeddings"


@contextlib.contextmanager
def trained_frequencies(model: nn.Module, max_length: int | None) -> Iterator[None]:
    """Let rotary embeddings that no sequence of max_length tokens can change be tables.

    None for max_length: any. Every attribute is given back afterwards.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules() if max_length is not None else ():
            kinds = getattr(module, "rope_type", None)
            if isinstance(kinds, (str, dict)):
                assert max_length is not None
                _fix(module, kinds, max_length, changed)
        yield
    finally:
        for space, name, value in reversed(changed):
            space[name] = value


def _fix(
    module: nn.Module,
    kinds: str | Mapping[str, str],
    max_length: int,
    changed: list[tuple[dict[str, Any], str, Any]],
) -> None:
    """Call the kinds "default" whose frequencies stay; put the trained ones into the buffers."""

    def put(space: dict[str, Any], name: str, value: Any) -> None:
        changed.append((space, name, space[name]))
        space[name] = value

    by_layer = {"": kinds} if isinstance(kinds, str) else dict(kinds)
    fixed = {}
    for layer, kind in by_layer.items():
        prefix = f"{layer}_" if layer else ""
        trained = getattr(module, f"{prefix}original_inv_freq", None)
        limit = _trained_length(module, layer, kind)
        name = f"{prefix}inv_freq"
        if not isinstance(trained, Tensor) or limit is None or limit < max_length:
            continue
        if name in module._buffers:
            put(module._buffers, name, trained)
            fixed[layer] = "default"
    if fixed:
        new = fixed[""] if isinstance(kinds, str) else {**kinds, **fixed}
        put(vars(module), "rope_type", new)


def _trained_length(module: nn.Module, layer: str, kind: str) -> int | None:
    """Return up to how many tokens the frequencies are those of the beginning; None: unknown."""
    config: Any = getattr(module, "config", None)
    if "dynamic" in kind:
        length = getattr(module, "original_max_seq_len", None)
    elif kind == "longrope":
        given: Any = getattr(config, "rope_parameters", None) or {}  # transformers 4: there is none
        given = given.get(layer, given) if layer else given
        length = given.get(LENGTH) or getattr(config, LENGTH, None)
        length = length or getattr(config, "max_position_embeddings", None)
    else:
        return None
    return length if isinstance(length, int) else None
