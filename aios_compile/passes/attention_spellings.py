"""Read the parts of an attention from the graph, whether it is a call or spelled out as matmuls.

Nothing is changed here. Spelled out means: matmul(q, k^T), a scale, a soft cap, a mask that is
added or selected, a column of sinks, softmax, matmul with v; with casts, reshapes and copies
between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.passes.attention_mask import HIDDEN, MaskNode
from aios_compile.passes.context import PassContext
from aios_compile.passes.match import (
    is_call,
    is_float_cast,
    positive,
    rank_of,
    scalar,
    scaled,
    shape_of,
    total,
)
from aios_compile.passes.rearrange import MOVES, chain, keeps_order

aten = torch.ops.aten
aios = torch.ops.aios


LOWEST = -1e30


class Operand(NamedTuple):
    """A value and its token, head and width dimensions; all others have size 1."""

    node: fx.Node
    dims: tuple[int, int, int]


class Attention(NamedTuple):
    """softmax(mask(cap(q k^T * scale)), with sinks) v."""

    q: Operand
    k: Operand
    v: Operand
    scale: float
    is_causal: bool
    masks: tuple[MaskNode, ...] = ()
    softcap: float | None = None
    sinks: fx.Node | None = None


class Scores(NamedTuple):
    """What was done to the scores between q k^T and the softmax, read backwards."""

    product: Any
    scale: float = 1.0
    softcap: float | None = None
    masks: tuple[MaskNode, ...] = ()
    sinks: fx.Node | None = None


def called(node: Any) -> Attention | str | None:
    """Read a call of scaled_dot_product_attention (or of the op that adds a soft cap and sinks)."""
    if not is_call(node, aios.sdpa.default):
        return None
    q, k, v, mask, is_causal, scale, _, softcap, sinks = (*node.args, None, None)[:9]
    rank = rank_of(q)
    if rank not in (3, 4) or (rank == 4 and any(shape_of(x)[0] != 1 for x in (q, k, v))):
        return "attention on a batch of sequences"
    dims = (rank - 2, rank - 3, rank - 1)
    width = shape_of(q)[-1]
    assert isinstance(width, int)
    masks = []
    if mask is not None:
        is_bool = mask.meta["val"].dtype == torch.bool
        masks = [MaskNode(mask, "visible" if is_bool else "additive")]
    return Attention(
        Operand(q, dims),
        Operand(k, dims),
        Operand(v, dims),
        width**-0.5 if scale is None else scale,
        is_causal and not masks,
        tuple(masks),
        softcap,
        sinks,
    )


def spelled(node: Any, context: PassContext) -> Attention | str | None:
    """Read an attention backwards from its last product, softmax(...) @ v."""
    if not is_call(node, aten.bmm.default):
        return None
    weights, v = node.args
    softmax: Any = chain(weights, aten._to_copy.default)[-1]
    if not is_call(softmax, aten._softmax.default) or not _is_square(weights):
        return None
    if positive(softmax.args[1], rank_of(softmax)) != rank_of(softmax) - 1:
        return "attention whose softmax is not over the keys"
    scores = _read_scores(softmax.args[0], context)
    if isinstance(scores, str):
        return scores
    if not keeps_order(weights, softmax, context, 0 if scores.sinks is None else 1):
        return "attention whose weights are rearranged before they meet the values"
    q, k = scores.product.args
    return Attention(
        Operand(q, (1, 0, 2)),
        Operand(k, (2, 0, 1)),
        Operand(v, (1, 0, 2)),
        scores.scale,
        False,
        scores.masks,
        scores.softcap,
        scores.sinks,
    )


def _is_square(node: fx.Node) -> bool:
    """Return whether a value has as many keys as queries, both symbolic: [.., T, T]."""
    rows, columns = shape_of(node)[-2:]
    return rows == columns and isinstance(rows, str)


def _read_scores(node: Any, context: PassContext) -> Scores | str:
    """Walk from the softmax's input to the product of queries and keys."""
    found = Scores(None)
    while not is_call(node, aten.bmm.default):
        before = node
        if is_float_cast(node):
            node = node.args[0]
        elif is_call(node, *MOVES):
            if not keeps_order(node, node.args[0], context, 0):
                return "attention whose scores are rearranged before the softmax"
            node = node.args[0]
        elif (step := scaled(node, context)) is not None:
            node, found = _scale(step, found, context)
        elif is_call(node, aten.maximum.default) and _is_lowest(node.args[1], context):
            node = node.args[0]  # a mask plus a score may not become minus infinity
        elif is_call(node, aten.sub.Tensor) and _is_row_maximum(node.args[1], node.args[0]):
            node = node.args[0]
        elif (joined := _sinks(node, context)) is not None:
            node, sinks = joined
            found = found._replace(sinks=sinks)
        elif (masked := _mask(node, context, found.scale)) is not None:
            if found.softcap is not None:
                return "attention whose mask comes before its soft cap"
            node, mask = masked
            found = found._replace(masks=(*found.masks, mask))
        if node is before:
            return f"attention whose scores go through {getattr(node, 'target', node)}"
    return found._replace(product=node)


def _scale(step: tuple[fx.Node, float], found: Scores, context: PassContext) -> tuple[Any, Scores]:
    """Read a factor, or a soft cap c * tanh(x / c)."""
    inner, factor = step
    if is_call(inner, aten.tanh.default):
        below = scaled(inner.args[0], context)
        if below is not None and abs(below[1] * factor - 1.0) < 1e-6 and found.scale == 1.0:
            return below[0], found._replace(softcap=factor)
    return inner, found._replace(scale=found.scale * factor)


def _is_row_maximum(node: Any, x: Any) -> bool:
    return is_call(node, aten.amax.default) and node.args[0] is x and len(node.args) > 2


def _sinks(node: Any, context: PassContext) -> tuple[Any, fx.Node] | None:
    """Read cat((scores, sinks), -1): one logit a head, the same for every query."""
    if not is_call(node, aten.cat.default) or len(node.args[0]) != 2 or len(node.args) < 2:
        return None
    scores, column = node.args[0]
    if positive(node.args[1], rank_of(node)) != rank_of(node) - 1 or shape_of(column)[-1] != 1:
        return None
    sinks = chain(column, aten._to_copy.default)[-1]
    heads = shape_of(column)[-3:-2]
    return (scores, sinks) if context.is_weight(sinks) and shape_of(sinks) == heads else None


def _is_lowest(node: Any, context: PassContext) -> bool:
    """Return whether a value is so low that only masked scores are below it."""
    value = scalar(node, context)
    return value is not None and value <= LOWEST


def _mask(node: Any, context: PassContext, scale: float = 1.0) -> tuple[Any, MaskNode] | None:
    """Read scores + mask, or where(condition, scores, minus infinity); `scale` comes after it."""
    if scale <= 0:
        return None
    hidden = HIDDEN / min(scale, 1.0)
    if is_call(node, aten.where.self):
        condition, first, second = node.args
        for scores, fill, kind in ((first, second, "visible"), (second, first, "hidden")):
            value = scalar(fill, context)
            if value is not None and value <= hidden:
                return scores, MaskNode(condition, kind)
    operands = total(node)
    if operands is not None and all(isinstance(o, fx.Node) for o in operands):
        for scores, mask in (operands, operands[::-1]):
            if shape_of(scores) == shape_of(node) and _is_scores(scores, context):
                return scores, MaskNode(mask, "additive", hidden, scale)
    return None


def _is_scores(node: Any, context: PassContext) -> bool:
    """Return whether a value comes from a product of queries and keys by pointwise steps."""
    for _ in range(16):
        if is_call(node, aten.bmm.default):
            return True
        step = scaled(node, context)
        if step is not None:
            node = step[0]
        elif is_call(node, *MOVES, aten._to_copy.default, aten.tanh.default):
            node = node.args[0]
        else:
            masked = _mask(node, context)
            if masked is None:
                return False
            node = masked[0]
    return False
