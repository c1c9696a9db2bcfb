"""Write products with weights as aios.linear(x[..., K], weight[N, K], bias[N]).

A linear layer reaches ATen as transposes, reshapes and mm. As one op on the stored weight it takes
half-precision weights, packs, merges with its neighbours and carries an epilogue: it is where
nearly all bytes of a step are read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.module import placeholders
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import (
    RESHAPES,
    is_call,
    only_user,
    rank_of,
    shape_of,
    total,
    without_casts,
)

aten = torch.ops.aten
aios = torch.ops.aios
TRANSPOSES = (aten.permute.default, aten.t.default, aten.transpose.int)


class Match(NamedTuple):
    """x[..., K] @ weight, the weight [N, K] or, when transposed, [K, N]."""

    x: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None


@graph_pass(numerics="reassociates")
def raise_linear(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite mm, addmm and bmm with a weight, and the reshapes around them, as aios.linear.

    A weight stored as [K, N] is transposed by the loader. A bias that is added afterwards is
    taken in.

    Before::

        def f(x: "f32[1, T, 64]", w: "weight f32[128, 64]", b: "weight f32[128]"):
            h = aten.view.default(x, [-1, 64])
            h = aten.mm.default(h, aten.permute.default(w, [1, 0]))
            return aten.add.Tensor(aten.view.default(h, [1, -1, 128]), b)

    After::

        def f(x: "f32[1, T, 64]", w: "weight f32[128, 64]", b: "weight f32[128]"):
            return aios.linear.default(x, w, b)
    """
    hits = 0
    for node in list(graph.nodes):
        found = _match(node, context)
        if isinstance(found, Match):
            _rewrite(graph, node, found, context)
            hits += 1
        elif found is not None:
            context.refuse(found)
    for node in graph.find_nodes(op="call_function", target=aios.linear.default):
        hits += _absorb_bias(graph, node, context)
    return hits


def _match(node: Any, context: PassContext) -> Match | Refusal | None:
    bias = None
    if is_call(node, aten.mm.default, aten.bmm.default):
        x, matrix = node.args
    elif is_call(node, aten.addmm.default):
        bias, x, matrix = node.args
        bias = without_casts(bias)
    else:
        return None
    weight, transposed = _weight(matrix, context)
    if weight is None:
        return None
    if bias is not None and not (context.is_weight(bias) and rank_of(bias) == 1):
        return Refusal("addmm adds something that is not a bias", provenance.place(node))
    if any(node.kwargs.get(k, 1) != 1 for k in ("beta", "alpha")):
        return Refusal("addmm scales its operands", provenance.place(node))
    return Match(x, weight, transposed, bias)


def _weight(matrix: Any, context: PassContext) -> tuple[fx.Node | None, bool]:
    """Return (weight, whether it is stored [K, N]) behind casts, a transpose and a batch expand."""
    transposed = True
    sizes = shape_of(matrix)[-2:]
    while isinstance(matrix, fx.Node):
        if context.is_weight(matrix):
            return (matrix, transposed) if rank_of(matrix) == 2 else (None, False)
        stripped = without_casts(matrix)
        if stripped is not matrix:
            matrix = stripped
        elif swaps_last(matrix):
            transposed, sizes = not transposed, sizes[::-1]
            matrix = matrix.args[0]
        elif _adds_batch(matrix) and shape_of(matrix.args[0])[-2:] == sizes:
            matrix = matrix.args[0]
        else:
            break
    return None, False


def swaps_last(node: Any) -> bool:
    """Return whether a node exchanges the last two dimensions and nothing else."""
    if not is_call(node, *TRANSPOSES):
        return False
    rank = rank_of(node)
    order = list(range(rank))
    order[-2:] = [rank - 1, rank - 2]
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]] == order
    return node.target is aten.t.default or {d % rank for d in node.args[1:3]} == set(order[-2:])


def _adds_batch(node: Any) -> bool:
    return is_call(node, *RESHAPES, aten.expand.default, aten.unsqueeze.default, aten.clone.default)


def _rewrite(graph: fx.Graph, node: fx.Node, match: Match, context: PassContext) -> None:
    weight = match.weight
    if match.transposed:
        weight = _stored_transposed(graph, weight, context)
    x, root = match.x, node
    width = shape_of(weight)[0]
    outside = x.args[0] if is_call(x, *RESHAPES) else None
    user = only_user(node)
    if outside is not None and is_call(user, *RESHAPES):
        assert user is not None
        if shape_of(user) == (*shape_of(outside)[:-1], width) and _keeps_rows(x):
            x, root = outside, user  # type: ignore[assignment]
    with graph.inserting_before(root):
        flat = _flat_rows(graph, x, node, context)
        arguments = (flat, weight) if match.bias is None else (flat, weight, match.bias)
        new = context.call(graph, aios.linear.default, *arguments, source=[node])
        if flat is not x:
            sizes = [s if isinstance(s, int) else -1 for s in root.meta["val"].shape]
            new = context.call(graph, aten.view.default, new, sizes, source=[node])
    root.replace_all_uses_with(new)


def _flat_rows(graph: fx.Graph, x: fx.Node, node: fx.Node, context: PassContext) -> fx.Node:
    """Return x[..., K] as rows [M, K]; kernels read no dimensions but ones before the rows."""
    *rows, width = x.meta["val"].shape
    if all(isinstance(s, int) and s == 1 for s in rows[:-1]):
        return x
    return context.call(graph, aten.reshape.default, x, [-1, width], source=[node])


def _keeps_rows(view: Any) -> bool:
    return shape_of(view)[-1] == shape_of(view.args[0])[-1]


def _stored_transposed(graph: fx.Graph, weight: fx.Node, context: PassContext) -> fx.Node:
    name = f"{weight.name}_transposed"
    known: list[fx.Node] = [n for n in placeholders(graph) if n.name == name]
    if known:
        return known[0]
    return context.add_weight(graph, name, [weight], lambda w: aten.permute.default(w, [1, 0]))


def _absorb_bias(graph: fx.Graph, node: Any, context: PassContext) -> int:
    """Rewrite linear(x, w) + b as linear(x, w, b), also behind a reshape of the rows."""
    if len(node.args) > 2:
        return 0
    user: Any = only_user(node)
    while is_call(user, *RESHAPES) and shape_of(user)[-1] == shape_of(node)[-1]:
        user = only_user(user)
    operands = total(user)
    if operands is None:
        return 0
    for bias, other in (operands, operands[::-1]):
        stored = without_casts(bias)
        if not context.is_weight(stored) or shape_of(stored) != (shape_of(node)[-1],):
            continue
        if shape_of(other) != shape_of(user):
            continue
        with graph.inserting_before(node):
            new = context.call(graph, aios.linear.default, *node.args, stored, source=[node, user])
        node.replace_all_uses_with(new)
        user.replace_all_uses_with(other if other is not node else new)
        return 1
    return 0
