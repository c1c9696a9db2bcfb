"""Where a model counts the tokens of its input itself: arange(T), the first T rows of a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aios_compile.ir.symbols import new_size

aten = torch.ops.aten
ARANGES = (aten.arange.default, aten.arange.start_step)
END = 2**63 - 1  # what ATen writes for "to the end"


def counted_from(node: Any, mode: Any) -> int | None:
    """Return what the first token gets from arange(a, T + a) or from rows a to T + a of a table.

    None for anything else, a step other than 1 and a first place that is not known among it.
    """
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return None
    tokens = new_size(mode, "T").node.expr
    if node.target in ARANGES:
        first, *rest = list(node.args) if len(node.args) > 1 else [0, *node.args]
        counts = rest[1:] in ([], [1]) and _is(value.shape[0], tokens)
    elif node.target is aten.slice.Tensor:
        dim, first, step = slice_of(node)
        before = node.args[0].meta["val"].shape[dim]
        counts = step == 1 and isinstance(before, int) and _is(value.shape[dim], tokens)
    else:
        return None
    return first if counts and type(first) is int and first >= 0 else None


def slice_of(node: Any) -> tuple[int, Any, int]:
    """Return dim, start and step of an aten.slice."""
    given: list[Any] = list(node.args[1:])
    dim, start, _, step = given + [0, None, END, 1][len(given) :]
    return dim, start or 0, step


def _is(size: Any, expression: Any) -> bool:
    return not isinstance(size, int) and bool(size.node.expr == expression)
