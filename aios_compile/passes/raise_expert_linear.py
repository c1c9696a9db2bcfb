"""Write products with chosen matrices as aios.expert_linear(x[M, K], weight[E, N, K], experts[P]).

A mixture of experts gathers the matrix of each chosen expert and multiplies one row with each. The
gathered copy would be tokens x choices x matrix: 480 GB for 512 tokens at the Mixtral 8x7B shape.
As one op the matrices are read in place, each once for all tokens that chose it.
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
from aios_compile.passes.raise_linear import swaps_last

aten = torch.ops.aten
aios = torch.ops.aios
SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)


class Match(NamedTuple):
    """vector[P, K, 1] or [P, 1, K] times weight[experts], the weight [E, N, K] or, when
    transposed, [E, K, N].
    """

    vector: fx.Node
    weight: fx.Node
    experts: fx.Node
    transposed: bool


@graph_pass(numerics="reassociates")
def raise_expert_linear(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite the product of rows with gathered matrices as aios.expert_linear.

    Rows that are repeated once a choice are read where they are; a weight stored as [E, K, N] is
    transposed by the loader; a gathered bias that is added afterwards is taken in.

    Before::

        def f(x: "f32[T, 48]", w: "weight f32[4, 80, 48]", e: "i64[T]"):
            y = aten.bmm.default(aten.index.Tensor(w, [e]), aten.unsqueeze.default(x, -1))
            return aten.squeeze.dim(y, -1)

    After::

        def f(x: "f32[T, 48]", w: "weight f32[4, 80, 48]", e: "i64[T]"):
            y = aios.expert_linear.default(x, w, e)
            return aten.squeeze.dim(aten.view.default(y, [-1, 80, 1]), -1)
    """
    hits = 0
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        found = _match(node, context)
        if isinstance(found, Match):
            _rewrite(graph, node, found, context)
            hits += 1
        elif found is not None:
            context.refuse(found)
    for node in graph.find_nodes(op="call_function", target=aios.expert_linear.default):
        hits += _absorb_bias(graph, node, context)
    return hits


def _match(node: Any, context: PassContext) -> Match | Refusal | None:
    a, b = node.args
    for matrix, vector, width in ((a, b, 2), (b, a, 1)):
        weight, experts, transposed = _chosen(matrix, context)
        if weight is None or experts is None:
            continue
        if shape_of(vector)[width] != 1:
            return Refusal("several rows meet each chosen matrix", provenance.place(node))
        return Match(vector, weight, experts, transposed != (matrix is b))
    return None


def _chosen(matrix: Any, context: PassContext) -> tuple[fx.Node | None, fx.Node | None, bool]:
    """Return (weight, experts, whether turned) of weight[experts] behind casts and transposes."""
    turned = False
    while isinstance(matrix, fx.Node):
        stripped = without_casts(matrix)
        if stripped is not matrix:
            matrix = stripped
        elif swaps_last(matrix):
            matrix, turned = matrix.args[0], not turned
        elif is_call(matrix, aten.clone.default):
            matrix = matrix.args[0]
        else:
            break
    weight, experts = chosen_rows(matrix)
    if weight is None or not context.is_weight(weight) or rank_of(weight) != 3:
        return None, None, False
    return weight, experts, turned


def chosen_rows(node: Any) -> tuple[Any, Any]:
    """Return (table, ids) of table[ids], ids of one dimension; (None, None) for other nodes."""
    table, ids = None, None
    if is_call(node, aten.index_select.default) and node.args[1] == 0:
        table, ids = node.args[0], node.args[2]
    elif is_call(node, aten.index.Tensor) and len(node.args[1]) == 1:
        table, ids = node.args[0], node.args[1][0]
    return (without_casts(table), ids) if rank_of(ids) == 1 else (None, None)


def _rewrite(graph: fx.Graph, node: fx.Node, match: Match, context: PassContext) -> None:
    weight = match.weight
    if match.transposed:
        weight = _stored_transposed(graph, weight, context)
    width, inner = shape_of(weight)[1:]
    vertical = shape_of(node)[2] == 1 and match.vector is node.args[1]
    with graph.inserting_before(node):
        x = _before_repeat(match.vector, inner)
        if rank_of(x) != 2:
            x = context.call(graph, aten.view.default, x, [-1, inner], source=[node])
        new = context.call(
            graph, aios.expert_linear.default, x, weight, match.experts, source=[node]
        )
        shape = [-1, width, 1] if vertical else [-1, 1, width]
        out = context.call(graph, aten.view.default, new, shape, source=[node])
    node.replace_all_uses_with(out)


def _before_repeat(vector: fx.Node, inner: Any) -> fx.Node:
    """Return the rows [.., M, K] that were repeated once a choice, else the vectors themselves."""
    node: Any = vector
    rows = vector
    while is_call(node, *RESHAPES, *SQUEEZES, aten.clone.default):
        node = node.args[0]
        rows = node if shape_of(node)[-1:] == (inner,) and rank_of(rows) != 2 else rows
    if not is_call(node, aten.expand.default):
        return rows
    source, wide = shape_of(node.args[0]), shape_of(node)
    repeated = len(source) == len(wide) >= 2 and source[-2] == 1 and source[-1] == inner
    if not repeated or source[:-2] != wide[:-2]:
        return rows
    before: fx.Node = node.args[0]
    return before


def _stored_transposed(graph: fx.Graph, weight: fx.Node, context: PassContext) -> fx.Node:
    name = f"{weight.name}_transposed"
    known: list[fx.Node] = [n for n in placeholders(graph) if n.name == name]
    if known:
        return known[0]
    return context.add_weight(graph, name, [weight], lambda w: aten.permute.default(w, [0, 2, 1]))


def _absorb_bias(graph: fx.Graph, node: Any, context: PassContext) -> int:
    """Rewrite expert_linear(x, w, e) + b[e] as expert_linear(x, w, e, b)."""
    if len(node.args) > 3:
        return 0
    width, user = shape_of(node)[-1], only_user(node)
    chain = node
    while is_call(user, *RESHAPES, *SQUEEZES):
        assert user is not None
        chain, user = user, only_user(user)
    operands = total(user)
    if operands is None or user is None or shape_of(chain) != shape_of(user):
        return 0
    for bias, other in (operands, operands[::-1]):
        table, ids = chosen_rows(without_casts(bias))
        if other is not chain or ids is not node.args[2] or shape_of(table)[1:] != (width,):
            continue
        if context.is_weight(table) and shape_of(bias) == shape_of(node) == shape_of(user):
            with graph.inserting_before(node):
                arguments = (*node.args, table)
                new = context.call(
                    graph, aios.expert_linear.default, *arguments, source=[node, user]
                )
            user.replace_all_uses_with(new)
            return 1
    return 0
