"""Recognise x / rms(x) * weight as aios.rms_norm.

Six launches and five round trips of the hidden state become one kernel with one read and one write,
and the op is what fuse_add_rms_norm and the norm prologue of a linear layer look for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import (
    HALF,
    centred_on_mean,
    dtype_of,
    is_float_cast,
    mean_of_last,
    only_user,
    product,
    quotients,
    shape_of,
    squared,
    without_casts,
)

aten = torch.ops.aten
aios = torch.ops.aios


class Match(NamedTuple):
    """rms_norm(x, weight, eps, scale_in_float32), whose value is `root`."""

    root: fx.Node
    x: fx.Node
    weight: fx.Node | None
    eps: float
    scale_in_float32: bool


@graph_pass(numerics="exact")
def raise_rms_norm(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite x * rsqrt(mean(x * x) + eps) * w, in any spelling, as aios.rms_norm.

    The mean may be a sum over the width, the square a power, the root a reciprocal or a division,
    the weight may be absent. Where half precision is cast up before and down after, the casts
    go too.

    Before::

        def f(x: "f32[T, 64]", w: "weight f32[64]"):
            mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)
            scale = aten.rsqrt.default(aten.add.Tensor(mean, 1e-06))
            return aten.mul.Tensor(w, aten.mul.Tensor(x, scale))

    After::

        def f(x: "f32[T, 64]", w: "weight f32[64]"):
            return aios.rms_norm.default(x, w, 1e-06, True)
    """
    hits = 0
    for node in list(graph.nodes):
        for found in _match(node, context):
            if isinstance(found, Match):
                _rewrite(graph, found, context)
                hits += 1
            else:
                context.refuse(found)
    return hits


def _match(mean: fx.Node, context: PassContext) -> list[Match | Refusal]:
    x = squared(mean_of_last(mean, context))
    if x is None or centred_on_mean(x, context) is not None:
        return []  # the second is layer normalisation
    found: list[Match | Refusal] = []
    for quotient in quotients(mean, context):
        if not quotient.node.users:
            continue
        if quotient.x is not x:
            reason = "the root mean square divides another value than its own"
            found.append(Refusal(reason, provenance.place(quotient.node)))
        else:
            found.append(_with_weight(quotient.node, x, quotient.eps, context))
    return found


def _with_weight(norm: fx.Node, x: fx.Node, eps: float, context: PassContext) -> Match:
    """Take in the weight and the casts around the norm, as far as they belong to it."""
    narrow = x.args[0] if is_float_cast(x) else None
    if isinstance(narrow, fx.Node) and dtype_of(narrow) in HALF:
        low = _cast_down(norm, narrow)
        if low is not None:
            weighted = _weighted(low, context)
            root, weight = weighted or (low, None)
            return Match(root, narrow, weight, eps, weight is None)
        weighted = _weighted(norm, context)
        low = _cast_down(weighted[0], narrow) if weighted else None
        if weighted and low is not None:
            return Match(low, narrow, weighted[1], eps, True)
    weighted = _weighted(norm, context)
    root, weight = weighted or (norm, None)
    return Match(root, x, weight, eps, dtype_of(x) not in HALF)


def _cast_down(node: fx.Node, narrow: fx.Node) -> fx.Node | None:
    user = only_user(node)
    return user if is_float_cast(user) and dtype_of(user) == dtype_of(narrow) else None


def _weighted(norm: fx.Node, context: PassContext) -> tuple[fx.Node, fx.Node] | None:
    """Return (norm * weight, weight) when that is the only use of the norm."""
    user = only_user(norm)
    factors = product(user)
    if user is None or factors is None or factors[0] is factors[1]:
        return None
    other = without_casts(factors[1] if factors[0] is norm else factors[0])
    if not context.is_weight(other) or shape_of(other) != shape_of(norm)[-1:]:
        return None
    return (user, other) if shape_of(user) == shape_of(norm) else None


def _rewrite(graph: fx.Graph, match: Match, context: PassContext) -> None:
    root, x, weight, eps, in_float32 = match
    with graph.inserting_before(root):
        arguments: tuple[Any, ...] = (x, weight, eps, in_float32)
        new = context.call(graph, aios.rms_norm.default, *arguments, source=[root])
        if dtype_of(new) != dtype_of(root):
            new = context.call(
                graph, aten._to_copy.default, new, dtype=dtype_of(root), source=[root]
            )
    root.replace_all_uses_with(new)
