"""Read the length of a sequence from the runtime instead of taking the largest position.

A flat batch holds tokens of many sequences, so the maximum over its positions is not the length of
any one of them. Where a model computes that maximum (RoPE whose base grows with the length), every
token gets the length of its own sequence instead.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from aios_compile.ir import provenance
from aios_compile.ir.module import placeholders
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import is_call, is_last, rank_of, shape_of, size_text, total

aten = torch.ops.aten
SHAPED = (aten.expand.default, aten.unsqueeze.default, aten._to_copy.default, aten.clone.default)


class Match(NamedTuple):
    """A maximum over positions, and the values that become one a token with it."""

    maximum: fx.Node
    values: dict[fx.Node, Tensor]


@graph_pass(numerics="exact")
def raise_sequence_lengths(graph: fx.Graph, context: PassContext) -> int:
    """Replace the maximum over positions, plus one, by the input `sequence_lengths` [T].

    What follows must work on each token alone, so that one value a token can stand for one of all.

    Before::

        def f(positions: "input i64[T]"):
            length = aten.add.Tensor(aten.amax.default(positions, [-1], True), 1)
            return aten.mul.Tensor(aten.expand.default(length, [-1]), positions)

    After::

        def f(positions: "input i64[T]", sequence_lengths: "input i64[T]"):
            return aten.mul.Tensor(aten.expand.default(sequence_lengths, [-1]), positions)
    """
    hits = 0
    for node in list(graph.nodes):
        found = _match(graph, node, context)
        if isinstance(found, Match):
            _rewrite(graph, found, context)
            hits += 1
        elif found is not None:
            context.refuse(found)
    return hits


def _match(graph: fx.Graph, node: Any, context: PassContext) -> Match | Refusal | None:
    positions = _maximised(node)
    if not node.users or not _is_positions(graph, positions, context):
        return None
    if shape_of(node) != (*shape_of(positions)[:-1], 1):
        reason = "the largest position is taken as one number for all tokens"
        return Refusal(reason, provenance.place(node))
    values: dict[fx.Node, Tensor] = {node: positions.meta["val"]}
    for user in graph.nodes:
        if any(n in values for n in user.all_input_nodes):
            reason = _extend(user, values, context)
            if reason:
                return Refusal(reason, provenance.place(user))
    return Match(node, values)


def _maximised(node: Any) -> Any:
    """Return x of max(x, -1)."""
    if is_call(node, aten.amax.default):
        dims = node.args[1] if len(node.args) > 1 else []
        every = not dims and rank_of(node.args[0]) == 1
        return node.args[0] if every or is_last(dims, rank_of(node.args[0])) else None
    if is_call(node, aten.max.default):
        return node.args[0]
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.max.dim):
        inner: Any = node.args[0]
        taken = node.args[1] == 0 and is_last(inner.args[1], rank_of(inner.args[0]))
        return inner.args[0] if taken else None
    return None


def _is_positions(graph: fx.Graph, node: Any, context: PassContext) -> bool:
    """Return whether a node is the runtime input `positions`, in every call of the region."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return False
    module = context.module
    bound: list[Any] = [node]
    if context.region:
        index = placeholders(graph).index(node)
        bound = [call.args[index] for call in module.calls(context.region)]
    return all(module.inputs.get(n.name) == "positions" for n in bound)


def _extend(user: fx.Node, values: dict[fx.Node, Tensor], context: PassContext) -> str:
    """Add the value that `user` takes; return the reason why it cannot be one a token, or ""."""
    pointwise = torch.Tag.pointwise in getattr(user.target, "tags", ())
    if user.op != "call_function" or not (pointwise or is_call(user, *SHAPED)):
        return "the length of the sequence is used by an operation that is not token by token"
    shapes = [_sizes(values.get(n)) or shape_of(n) for n in user.all_input_nodes]
    if is_call(user, aten.expand.default) and shapes[0] == shape_of(user):
        return ""
    if pointwise and not _broadcasts(shapes):
        return "the length of the sequence meets a dimension that is not the tokens'"
    args, kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: values.get(n, n.meta["val"]))
    with context.module.mode, torch.no_grad():
        new = user.target(*args, **kwargs)  # type: ignore[operator]
    if _sizes(new) != shape_of(user):
        values[user] = new
    return ""


def _sizes(value: Tensor | None) -> tuple[Any, ...]:
    return () if value is None else tuple(size_text(s) for s in value.shape)


def _broadcasts(shapes: list[tuple[Any, ...]]) -> bool:
    for dim in range(1, max(map(len, shapes)) + 1):
        if len({s[-dim] for s in shapes if len(s) >= dim} - {1}) > 1:
            return False
    return True


def _rewrite(graph: fx.Graph, match: Match, context: PassContext) -> None:
    maximum, values = match
    lengths = context.add_input(graph, "sequence_lengths", ["T"], torch.int64)
    with graph.inserting_before(maximum):
        if rank_of(maximum) > 1:
            lengths = context.call(graph, aten.view.default, lengths, [1, -1], source=[maximum])
        if not all(_is_next(user, maximum) for user in maximum.users):
            before = context.call(graph, aten.sub.Tensor, lengths, 1, source=[maximum])
            maximum.replace_all_uses_with(before, lambda user: not _is_next(user, maximum))
    for user in list(maximum.users):
        user.replace_all_uses_with(lengths)
    for node, value in values.items():
        node.meta["val"] = value


def _is_next(user: fx.Node, maximum: fx.Node) -> bool:
    """Return whether a node is maximum + 1: the length."""
    operands = total(user)
    return operands is not None and operands[0] is maximum and operands[1] == 1
