"""Compute what depends only on weights while loading, and drop arithmetic that changes nothing.

Gemma's 1 + w, frequency tables, scaled weights: each costs a launch a step, or hides a norm from
its pattern. The loader runs the recipe once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.module import placeholders
from aios_compile.passes.context import PassContext
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import RESHAPES, dtype_of, is_call, scalar, shape_of, value_of

aten = torch.ops.aten
COPIES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.clone.default)
MOVES = (
    *RESHAPES,
    *COPIES,
    aten._to_copy.default,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.cat.default,
    aten.repeat.default,
)
FACTORIES = (
    aten.full.default,
    aten.arange.start_step,
    aten.arange.default,
    aten.scalar_tensor.default,
)
NEUTRAL = {
    aten.mul.Tensor: 1.0,
    aten.div.Tensor: 1.0,
    aten.pow.Tensor_Scalar: 1.0,
    aten.add.Tensor: 0.0,
    aten.sub.Tensor: 0.0,
}
COMMUTE = (aten.mul.Tensor, aten.add.Tensor)


@graph_pass(numerics="exact")
def fold_constants(graph: fx.Graph, context: PassContext) -> int:
    """Turn arithmetic on weights into weights with a recipe; write known scalars as literals.

    Moving and casting a weight is left to its user, which reads it as it is stored. Products with
    one, sums with zero, casts to the same dtype and copies of contiguous values disappear.

    Before::

        def f(x: "f32[T, 64]", w: "weight f32[64]"):
            y = aten.mul.Tensor(x, aten.add.Tensor(w, 1.0))
            return aten.clone.default(aten.mul.Tensor(y, 1.0))

    After::

        def f(x: "f32[T, 64]", w_folded: "weight f32[64]"):
            return aten.mul.Tensor(x, w_folded)
    """
    hits = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.users:
            hits += _write_literal(node, context) or _drop_neutral(node, context)
    return hits + _fold_weights(graph, context)


def _drop_neutral(node: Any, context: PassContext) -> int:
    source = _unchanged(node, context)
    if source is None or shape_of(source) != shape_of(node) or dtype_of(source) != dtype_of(node):
        return 0
    node.replace_all_uses_with(source)
    return 1


def _unchanged(node: Any, context: PassContext) -> Any:
    """Return the operand that a node returns as it is."""
    if node.target in COPIES:
        plain = node.target is not aten.clone.default or _is_contiguous(node.args[0])
        return node.args[0] if plain else None
    if node.target is aten._to_copy.default:
        return node.args[0] if set(node.kwargs) <= {"dtype", "device"} else None
    if node.target not in NEUTRAL or node.kwargs:
        return None
    x, other = node.args[:2]
    if scalar(other, context) == NEUTRAL[node.target]:
        return x
    swapped = node.target in COMMUTE and scalar(x, context) == NEUTRAL[node.target]
    return other if swapped and isinstance(other, fx.Node) else None


def _is_contiguous(node: Any) -> bool:
    value = value_of(node)
    return value is not None and value.is_contiguous()


def _write_literal(node: Any, context: PassContext) -> int:
    """Write x * buffer[] as x * 0.5 when the buffer's value is known."""
    if node.target not in NEUTRAL or len(node.args) != 2 or node.kwargs:
        return 0
    for i, operand in enumerate(node.args):
        other = node.args[1 - i]
        known = scalar(operand, context) if isinstance(operand, fx.Node) else None
        possible = i == 1 or node.target in COMMUTE
        if known is None or not possible or not shape_of(other):
            continue
        if dtype_of(other) != dtype_of(node):
            continue
        node.args = (other, known)
        return 1
    return 0


def _fold_weights(graph: fx.Graph, context: PassContext) -> int:
    """Replace the last nodes that depend on weights only by new weights."""
    sources = {n: (n,) for n in placeholders(graph) if context.is_weight(n)}
    foldable: dict[fx.Node, tuple[fx.Node, ...]] = dict(sources)
    for node in graph.nodes:
        if node.op == "call_function" and _is_static(node, foldable):
            found = [s for n in node.all_input_nodes for s in foldable[n]]
            foldable[node] = tuple(dict.fromkeys(found))
    folded = {}
    for node in [n for n in foldable if n not in sources and foldable[n]]:
        wanted = any(u not in foldable or _is_free(u) for u in node.users)
        if wanted and not _is_free(node):
            weights = foldable[node]
            name = f"{weights[0].name}_folded"
            folded[node] = context.add_weight(graph, name, weights, _replay(node, weights))
            provenance.inherit(folded[node], [node])  # an output that is only this has a line
    for node, new in folded.items():  # after the last replay: it reads the nodes as they were
        node.replace_all_uses_with(new)
    return len(folded)


def _is_static(node: fx.Node, foldable: dict[fx.Node, Any]) -> bool:
    value = value_of(node)
    if value is None or not all(isinstance(s, int) for s in value.shape):
        return False
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    inputs = node.all_input_nodes
    return all(n in foldable for n in inputs) and (bool(inputs) or node.target in FACTORIES)


def _is_free(node: fx.Node) -> bool:
    """Return whether a node only moves or casts values, as a kernel that reads it can."""
    return (
        node.op == "call_function" and node.target in MOVES and not is_call(node, aten.cat.default)
    )


def _replay(node: fx.Node, weights: Sequence[fx.Node]) -> Callable[..., Any]:
    """Return a function of the weights that computes a node again."""

    def build(*values: Any) -> Any:
        known: dict[fx.Node, Any] = dict(zip(weights, values))

        def compute(n: fx.Node) -> Any:
            if n not in known:
                args, kwargs = fx.node.map_arg((n.args, n.kwargs), compute)
                known[n] = n.target(*args, **kwargs)  # type: ignore[operator]
            return known[n]

        return compute(node)

    return build
