"""Move layout views from behind a norm or rope of heads to before it.

Foreign modules transpose heads and carry a batch dimension of 1 between the ops that
fuse_qk_norm_rope_kv_write wants side by side. What views do is found out by running them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import placeholders
from aios_compile.passes.context import PassContext
from aios_compile.passes.fusion_groups import RESHAPES, getitems, is_call, is_view, shape_of

aten = torch.ops.aten
aios = torch.ops.aios


def sink_views(graph: fx.Graph, write: fx.Node, context: PassContext) -> None:
    """Move the views behind rope and norm of a kv_write's keys and of its attention's queries."""
    readers = [u for item in getitems(write) for u in item.users]
    for user in [write, *(u for u in readers if is_call(u, aios.paged_attention.default))]:
        _sink(graph, user, aios.rope.default, context)
        rope = user.args[0]
        above = rope if is_call(rope, aios.rope.default) else user
        _sink(graph, above, aios.rms_norm.default, context)  # type: ignore[arg-type]


def distances_vary(heads: fx.Node) -> bool:
    """Return whether heads [..., T, H, D] lie at distances that are not numbers, but depend on T.

    The Triton kernels of heads have no place for such.
    """
    value = heads.meta["val"]
    kept = [d for s, d in zip(value.shape, value.stride()) if not (isinstance(s, int) and s == 1)]
    return len(kept) > 2 and not all(isinstance(distance, int) for distance in kept)


def _sink(graph: fx.Graph, user: fx.Node, target: Any, context: PassContext) -> None:
    """Rewrite user(views(op(x))) as user(op(views(x))) when op works row by row through them."""
    views, op = list[fx.Node](), user.args[0]
    while is_view(op) and len(op.users) == 1:  # type: ignore[union-attr]
        views.append(op)  # type: ignore[arg-type]
        op = op.args[0]  # type: ignore[union-attr]
    if not views or not is_call(op, target) or len(op.users) > 1:  # type: ignore[union-attr]
        return
    assert isinstance(op, fx.Node)
    keeps_rows = _drops_leading_ones if target is aios.rope.default else _keeps_rows
    if not keeps_rows(op, views):
        return
    with graph.inserting_before(views[0]):
        moved = [op.args[0]]
        for view in reversed(views):
            target_of = aten.reshape.default if view.target in RESHAPES else view.target
            moved.append(context.call(graph, target_of, moved[-1], *view.args[1:], source=[view]))
        others = list(op.args[1:])
        for i, table in enumerate(others[:2] if target is aios.rope.default else []):
            others[i] = _without_leading_ones(graph, table, views[0], context)
        outer = context.call(graph, target, moved[-1], *others, source=[op])
    user.replace_input_with(views[0], outer)
    for node in [*views, op]:
        graph.erase_node(node)


def _keeps_rows(norm: fx.Node, views: list[fx.Node]) -> bool:
    """Return whether rows of the last dimension come out of the views whole and in order."""
    shape = _example_shape(norm)
    rows, width = math.prod(shape[:-1]), shape[-1]
    out = _run(views, torch.arange(rows * width).reshape(shape))
    if out is None or not out.dim() or out.shape[-1] != width:
        return False
    return bool(
        (out % width == torch.arange(width)).all() and (out // width == out[..., :1] // width).all()
    )


def _drops_leading_ones(rope: fx.Node, views: list[fx.Node]) -> bool:
    """Return whether all that the views do is to remove leading dimensions of size 1."""
    shape = _example_shape(rope)
    data = torch.arange(math.prod(shape)).reshape(shape)
    out = _run(views, data)
    extra = 0 if out is None else len(shape) - out.dim()
    if out is None or extra < 0 or tuple(shape) != (1,) * extra + tuple(out.shape):
        return False
    return torch.equal(out, data.reshape(out.shape))


def _example_shape(node: fx.Node) -> list[int]:
    """Return a node's shape with a small number for each symbolic size."""
    return [s if isinstance(s, int) else 3 for s in node.meta["val"].shape]


def _run(views: list[fx.Node], data: torch.Tensor) -> torch.Tensor | None:
    """Run views (the last one first) on numbers: what they do is found out, not read."""
    for view in reversed(views):
        if len(view.all_input_nodes) > 1:
            return None  # a size of this step is among the arguments
        target: Any = aten.reshape.default if view.target in RESHAPES else view.target
        try:
            data = target(data, *view.args[1:], **view.kwargs)
        except RuntimeError:
            return None
    return data


def _without_leading_ones(
    graph: fx.Graph, table: Any, view: fx.Node, context: PassContext
) -> fx.Node:
    """Squeeze a table [..., T, R] to the rank that x [..., T, H, D] has left."""
    assert isinstance(table, fx.Node)
    while len(shape_of(table)) > len(shape_of(view)) - 1:
        squeezed = next((u for u in table.users if is_call(u, aten.squeeze.dim)), None)
        if squeezed is None or squeezed.args[1] != 0:
            holders = placeholders(graph)
            with graph.inserting_after(holders[-1] if table in holders else table):
                squeezed = context.call(graph, aten.squeeze.dim, table, 0, source=[view])
        table = squeezed
        assert isinstance(table, fx.Node)
    return table
