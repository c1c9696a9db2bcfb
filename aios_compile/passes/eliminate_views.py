"""Cancel and compose transposes, reshapes and copies between the raised ops.

A transpose that is not cancelled becomes strides that a kernel must follow, a copy becomes a launch
and a round trip of the hidden state; and a chain of views hides one op from the next.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from aios_compile.passes.context import PassContext, fake_value
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import (
    RESHAPES,
    SPLITS,
    is_call,
    positive,
    shape_argument,
    shape_of,
    value_of,
)

aten = torch.ops.aten
aios = torch.ops.aios
SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
SAME = (*RESHAPES, aten.expand.default, aten.slice.Tensor, aten.permute.default, *SQUEEZES)
ROWWISE = (aios.rms_norm.default, aios.layer_norm.default)


@graph_pass(numerics="exact")
def eliminate_views(graph: fx.Graph, context: PassContext) -> int:
    """Replace chains of views by one or two; drop copies of contiguous values.

    Transposes sink below functions of one value, so that they meet and cancel. Dimensions of size
    one are ignored where only they move. Sizes that follow from the input are written as -1.

    Before::

        def f(x: "f32[1, T, 4, 64]"):
            y = aten.exp.default(aten.permute.default(x, [0, 2, 1, 3]))
            y = aten.permute.default(aten.select.int(y, 0, 0), [1, 0, 2])
            return aten.view.default(aten.clone.default(y), [-1, 256])

    After::

        def f(x: "f32[1, T, 4, 64]"):
            return aten.view.default(aten.exp.default(x), [-1, 256])
    """
    hits = 0
    while changed := sum(_simplify(graph, n, context) for n in list(graph.nodes) if n.users):
        hits += changed
        for node in graph.nodes:  # strides have changed: copies may have become superfluous
            if node.op == "call_function":
                node.meta["val"] = fake_value(node, context.module)
    return hits


def _simplify(graph: fx.Graph, node: fx.Node, context: PassContext) -> int:
    return int(
        _drop_unchanged(node)
        or _drop_sizes(node)
        or _compose_reshapes(graph, node, context)
        or _compose_moves(graph, node, context)
        or _sink_permute(graph, node, context)
        or _sink_below_cut(graph, node, context)
    )


def _drop_unchanged(node: Any) -> bool:
    """Replace a view that changes nothing, or a copy of a contiguous value, by its input."""
    if is_call(node, aten.clone.default):
        value = value_of(node.args[0])
        unchanged = value is not None and value.is_contiguous()
    else:
        same = is_call(node, *SAME) and shape_of(node) == shape_of(node.args[0])
        unchanged = same and not _reorders(node)
    if unchanged:
        node.replace_all_uses_with(node.args[0])
    return unchanged


def _reorders(node: Any) -> bool:
    return is_call(node, aten.permute.default) and _labels(node, node.args[0]) != _numbers(
        node.args[0]
    )


def _drop_sizes(node: Any) -> bool:
    """Write a symbolic size in a shape as -1, which needs no size node."""
    if not is_call(node, *RESHAPES, aten.expand.default):
        return False
    shape = list(node.args[1])
    if not any(isinstance(s, fx.Node) for s in shape):
        return False
    if node.target is aten.expand.default:
        source = shape_of(node.args[0])
        own = [None] * (len(shape) - len(source)) + list(source)
        new = [
            -1 if isinstance(s, fx.Node) and isinstance(o, str) else s for s, o in zip(shape, own)
        ]
    else:
        new = shape_argument(node.meta["val"]) or shape
    node.args = (node.args[0], new)
    return new != shape


def _compose_reshapes(graph: fx.Graph, node: Any, context: PassContext) -> bool:
    """Read a reshape of a reshape, or of ones that come and go, from the first input."""
    inner: Any = node.args[0] if node.op == "call_function" and node.args else None
    pair = is_call(node, *RESHAPES) or is_call(inner, *RESHAPES)
    if not pair or not (_is_reshape(node) and _is_reshape(inner)):
        return False
    shape = shape_argument(node.meta["val"])
    if shape is None:
        return False
    with graph.inserting_before(node):
        new = context.call(graph, aten.view.default, inner.args[0], shape, source=[node])
    node.replace_all_uses_with(new)
    return True


def _is_reshape(node: Any) -> bool:
    ones = (aten.unsqueeze.default, aten.select.int, *SQUEEZES)
    return is_call(node, *RESHAPES) or (
        is_call(node, *ones) and _labels(node, node.args[0]) is not None
    )


def _numbers(node: fx.Node) -> list[int]:
    """Number the dims of a node that are larger than one."""
    return [i for i, size in enumerate(shape_of(node)) if size != 1]


def _labels(node: Any, source: Any) -> list[int] | None:
    """Return which dim of the input each dim larger than one of a node was; None if mixed."""
    before = [i for i, size in enumerate(shape_of(source)) if size != 1]
    if is_call(node, aten.permute.default):
        order = [positive(d, len(node.args[1])) for d in node.args[1]]
        return [d for d in order if d in before]
    moves = (*SAME, aten.unsqueeze.default, aten.select.int, aten.alias.default)
    sizes = [[s for s in shape_of(n) if s != 1] for n in (node, source)]
    return before if is_call(node, *moves) and sizes[0] == sizes[1] else None


def _compose_moves(graph: fx.Graph, node: fx.Node, context: PassContext) -> bool:
    """Replace a chain of transposes, and ones that come and go, by a transpose and a view."""
    base, order, length = node, None, 0
    while True:
        source: Any = base.args[0] if base.op == "call_function" and base.args else None
        labels = _labels(base, source) if isinstance(source, fx.Node) else None
        if labels is None:
            break
        rank = {d: i for i, d in enumerate(_numbers(base))}
        order = labels if order is None else [labels[rank[d]] for d in order]
        base, length = source, length + 1
    value = value_of(node)
    shape = None if value is None else shape_argument(value)
    if order is None or length < 2 or shape is None:
        return False
    with graph.inserting_before(node):
        new = _moved(graph, base, order, node, shape, length, context)
    if new is None:
        return False
    node.replace_all_uses_with(new)
    return True


def _moved(
    graph: fx.Graph,
    base: fx.Node,
    order: list[int],
    node: fx.Node,
    shape: list[int],
    length: int,
    context: PassContext,
) -> fx.Node | None:
    """Insert the shortest chain from base to node; None when it is no shorter than `length`."""
    if order == sorted(order):
        if shape_of(base) == shape_of(node):
            return base
        return context.call(graph, aten.view.default, base, shape, source=[node])
    ones = [i for i, size in enumerate(shape_of(base)) if size == 1]
    full, kept = [], iter(order)
    fits = shape_of(node).count(1) == len(ones)
    for size in shape_of(node) if fits else [None] * len(ones):
        full.append(ones.pop(0) if size in (1, None) else next(kept))
    full += list(kept)
    if length <= 1 + (not fits):
        return None
    new = context.call(graph, aten.permute.default, base, full, source=[node])
    return new if fits else context.call(graph, aten.view.default, new, shape, source=[node])


def _sink_permute(graph: fx.Graph, node: Any, context: PassContext) -> bool:
    """Rewrite f(permute(x)) as permute(f(x)) for a function of each element, or of each row."""
    inputs = node.all_input_nodes
    permute: Any = inputs[0] if inputs else None
    if not is_call(permute, aten.permute.default) or is_call(node, aten.clone.default):
        return False
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or is_call(
        node, aten._to_copy.default
    )
    order = permute.args[1]
    # A row op gives a contiguous value, which a reshape may need: only transposes may follow it.
    row = is_call(node, *ROWWISE) and positive(order[-1], len(order)) == len(order) - 1
    row = row and all(is_call(u, aten.permute.default) for u in node.users)
    alone = len(inputs) == 1 and list(node.args).count(permute) == 1
    if not ((row and node.args[0] is permute) or (pointwise and alone)):
        return False
    if shape_of(node) != shape_of(permute):
        return False
    with graph.inserting_before(node):
        args = [permute.args[0] if a is permute else a for a in node.args]
        new = context.call(graph, node.target, *args, source=[node], **node.kwargs)
        new = context.call(graph, aten.permute.default, new, order, source=[permute])
    node.replace_all_uses_with(new)
    return True


def _sink_below_cut(graph: fx.Graph, node: Any, context: PassContext) -> bool:
    """Rewrite a slice or the pieces of a split of permute(x) as permutes of those parts of x."""
    is_split = is_call(node, *SPLITS)
    if not is_split and not is_call(node, aten.slice.Tensor):
        return False
    permute: Any = node.args[0]
    if not is_call(permute, aten.permute.default):
        return False
    order = [positive(d, len(permute.args[1])) for d in permute.args[1]]
    place = 2 if is_split else 1
    dim = order[positive(node.args[place] if len(node.args) > place else 0, len(order))]
    arguments = (permute.args[0], *node.args[1:place], dim, *node.args[place + 1 :])
    with graph.inserting_before(node):
        new = context.call(graph, node.target, *arguments, source=[node])
        for part in list(node.users) if is_split else [node]:
            value = new
            if is_split:
                value = context.call(graph, operator.getitem, new, part.args[1], source=[part])
            value = context.call(graph, aten.permute.default, value, order, source=[permute])
            part.replace_all_uses_with(value)
            if is_split:
                graph.erase_node(part)
    return True
