"""Recognise the plane rotations of a rotary embedding in their many spellings; changes nothing.

With x = (a, b) the pairs of one head, every spelling computes (a cos - b sin, b cos + a sin). The
pairs are halves (a = x[:R/2], b = x[R/2:]) or neighbours (a = x[0::2], b = x[1::2]); the tables are
as wide as x, multiplied with x and with turned(x) = (-b, a), or half as wide, multiplied with a
and b.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.passes.match import (
    RESHAPES,
    Part,
    is_call,
    only_user,
    part,
    positive,
    product,
    rank_of,
    shape_of,
    total,
)

aten = torch.ops.aten


class Rotation(NamedTuple):
    """x with its first `width` dims turned by tables of that width or half of it."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    width: int
    interleaved: bool


class Pairs(NamedTuple):
    """Two halves of a value's pairs: (first, second), as parts of x[..., :width]."""

    x: fx.Node
    width: int
    interleaved: bool


def rotation(root: Any) -> Rotation | None:
    """Return the rotation whose value is `root`, with the dims that pass through, or None."""
    joined = _concatenated(root) or []
    found = None
    if len(joined) == 2:
        found = _with_rest(_full(joined[0]), joined[1])
    elif len(joined) == 3:
        found = _with_rest(_half(joined[:2], False), joined[2])
    return found or (None if _passes_through_later(root) else _full(root))


def _full(root: Any) -> Rotation | None:
    """Match a rotation of all dims of x."""
    found = _by_full_tables(root)
    if found is None:
        interleaved = _interleaved_columns(root)
        halves = interleaved or _concatenated(root)
        found = _half(halves, interleaved is not None) if halves and len(halves) == 2 else None
    if found is None:
        return None
    whole = shape_of(found.x)[-1] == found.width
    return found if whole else _of_slice(found, root)


def _of_slice(found: Rotation, root: fx.Node) -> Rotation | None:
    """Keep a rotation of x[..., :R] alone only when its pass-through dims are joined later."""
    return found if shape_of(root)[-1] == found.width else None


def _by_full_tables(root: Any) -> Rotation | None:
    """Match x * cos + turned(x) * sin."""
    operands = total(root)
    if operands is None:
        return None
    for straight, turned in (operands, operands[::-1]):
        first, second = product(straight), product(turned)
        if first is None or second is None:
            continue
        for rotated, sin in (second, second[::-1]):
            pairs = _turned(rotated)
            if pairs is None:
                continue
            for x, cos in (first, first[::-1]):
                widths = (shape_of(cos)[-1:], shape_of(sin)[-1:], shape_of(x)[-1:])
                if x is pairs.x and set(widths) == {(pairs.width,)}:
                    return Rotation(x, cos, sin, pairs.width, pairs.interleaved)
    return None


def _turned(node: Any) -> Pairs | None:
    """Match (-b, a) of x."""
    columns = _interleaved_columns(node)
    pieces = columns or _concatenated(node)
    if pieces is None or len(pieces) != 2 or not is_call(pieces[0], aten.neg.default):
        return None
    return _pairs(pieces[1], pieces[0].args[0], columns is not None)


def _half(outputs: Any, interleaved: bool) -> Rotation | None:
    """Match (a cos - b sin, b cos + a sin) with tables of half the width."""
    first, second = outputs
    if not is_call(first, aten.sub.Tensor) or first.kwargs or total(second) is None:
        return None
    minuend, subtrahend = product(first.args[0]), product(first.args[1])
    if minuend is None or subtrahend is None:
        return None
    for a, cos in (minuend, minuend[::-1]):
        for b, sin in (subtrahend, subtrahend[::-1]):
            pairs = _pairs(a, b, interleaved)
            if pairs is not None and _is_sum_of(second, (b, cos), (a, sin)):
                return Rotation(pairs.x, cos, sin, pairs.width, interleaved)
    return None


def _is_sum_of(node: Any, *wanted: tuple[Any, Any]) -> bool:
    """Return whether a node is the sum of two products, in any order."""
    found = [product(operand) for operand in total(node) or ()]
    sets = [frozenset(map(id, factors)) for factors in found if factors is not None]
    return len(sets) == 2 and set(sets) == {frozenset(map(id, factors)) for factors in wanted}


def _pairs(a: Any, b: Any, interleaved: bool) -> Pairs | None:
    """Match a and b as the two halves of the pairs of x."""
    if interleaved:
        first, second = _column(a, 0), _column(b, 1)
        if first is None or first is not second:
            return None
        width = shape_of(first)[-1]
        return Pairs(first, width, True) if isinstance(width, int) else None
    low, high = part(a), part(b)
    if low is None or high is None or low.source is not high.source:
        return None
    half = low.stop
    fits = low == Part(low.source, 0, half) and high == Part(low.source, half, 2 * half)
    return Pairs(low.source, 2 * half, False) if fits else None


def _column(node: Any, index: int) -> Any:
    """Return x of x[..., index::2] or x.reshape(..., R / 2, 2)[..., index]."""
    found = part(node)
    if found is not None and found.step == 2 and found.start == index:
        return found.source if found.stop == shape_of(found.source)[-1] else None
    last = rank_of(node)
    if is_call(node, aten.select.int) and positive(node.args[1], last + 1) == last:
        pairs: Any = node.args[0]
        if node.args[2] % 2 == index and is_call(pairs, *RESHAPES) and shape_of(pairs)[-1] == 2:
            x = pairs.args[0]
            return x if shape_of(x)[:-1] == shape_of(pairs)[:-2] else None
    return None


def _interleaved_columns(node: Any) -> list[Any] | None:
    """Return [a, b] of stack((a, b), -1).flatten(-2)."""
    if not is_call(node, *RESHAPES):
        return None
    inner: Any = node.args[0]
    if is_call(inner, aten.clone.default):
        inner = inner.args[0]
    columns = _concatenated(inner)
    if columns is None or len(columns) != 2 or shape_of(inner)[-1] != 2:
        return None
    if shape_of(inner)[:-2] != shape_of(node)[:-1]:
        return None
    last = rank_of(inner)
    if any(not is_call(c, aten.unsqueeze.default) for c in columns):
        return None
    if any(positive(c.args[1], last) != last - 1 for c in columns):
        return None
    return [c.args[0] for c in columns]


def _concatenated(node: Any) -> list[Any] | None:
    """Return the pieces of a concatenation along the last dimension."""
    if not is_call(node, aten.cat.default) or len(node.args) < 2:
        return None
    return (
        list(node.args[0]) if positive(node.args[1], rank_of(node)) == rank_of(node) - 1 else None
    )


def _with_rest(found: Rotation | None, rest: Any) -> Rotation | None:
    """Extend a rotation of x[..., :R] to x when the rest of x is joined behind it."""
    tail = part(rest)
    if found is None or tail is None or tail.step != 1:
        return None
    width = shape_of(tail.source)[-1]
    if tail.start != found.width or tail.stop != width:
        return None
    if found.x is tail.source:
        return found
    head = part(found.x)
    if head == Part(tail.source, 0, found.width):
        return found._replace(x=tail.source)
    return None


def _passes_through_later(root: Any) -> bool:
    """Return whether the dims that pass through are joined to this rotation by its only user."""
    user: Any = only_user(root)
    joined = _concatenated(user) if user is not None else None
    return joined is not None and rotation(user) is not None
