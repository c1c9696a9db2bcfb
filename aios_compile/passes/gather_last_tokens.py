"""Compute logits of the rows that need them, not of every token of a prefill.

Pays once a step: the vocabulary projection is the largest matrix (a third of all weights at the
0.6B shape) and a prefill chunk needs one row of it. The final norm and all else that works token by
token after the last layer shrinks from T to R rows too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from aios_compile.errors import PassError
from aios_compile.ir import provenance
from aios_compile.ir.module import outputs
from aios_compile.ir.symbols import new_size
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fusion_groups import (
    NORMS,
    REDUCTIONS,
    is_call,
    is_pointwise,
    is_view,
    shape_of,
)
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.token_mixing import mixing_nodes

aten = torch.ops.aten
aios = torch.ops.aios
PRODUCTS = frozenset({aios.linear.default, aten.mm.default, aten.addmm.default})


class Match(NamedTuple):
    logits: fx.Node
    tail: list[fx.Node]  # token-wise nodes that feed nothing but the logits, in graph order


def _match(graph: fx.Graph, context: PassContext) -> Match | Refusal | None:
    logits = outputs(graph)[0]
    if not isinstance(logits, fx.Node):
        return Refusal("the first output is not a tensor")
    tokens = new_size(context.module.mode, "T").node.expr
    if "logit_rows" in context.module.inputs.values():
        return None
    if _token_dim(logits, tokens) is None:
        line = provenance.place(logits)
        return Refusal("the logits have no token axis", line)
    inside: set[fx.Node] = set()
    mixing = set(mixing_nodes(context.module)) if context.module.not_generatable else set()
    for node in reversed(graph.nodes):
        if node in mixing:
            continue
        feeds_tail = all(u in inside or (node is logits and u.op == "output") for u in node.users)
        if node.users and feeds_tail and _is_token_wise(node, tokens):
            inside.add(node)
    return Match(logits, [n for n in graph.nodes if n in inside])


def _token_dim(node: fx.Node, tokens: Any) -> int | None:
    """Return the one dimension of size T, or None."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    found = [
        i for i, s in enumerate(value.shape) if not isinstance(s, int) and s.node.expr == tokens
    ]
    return found[0] if len(found) == 1 else None


def _is_token_wise(node: fx.Node, tokens: Any) -> bool:
    """Return whether row t of the result depends on row t of the inputs only."""
    dim = _token_dim(node, tokens)
    if dim is None or node.op != "call_function":
        return False
    if is_view(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if is_call(node, aten.slice.Tensor, aten.select.int):
            if shape_of(node) == shape_of(source):
                return True  # of all tokens
            axis = node.args[1] if len(node.args) > 1 else 0
            assert isinstance(axis, int)
            return bool(axis % source.meta["val"].dim() != _token_dim(source, tokens))
        return _token_dim(source, tokens) is not None
    if is_call(node, *NORMS, *PRODUCTS):
        rows = node.args[1 if is_call(node, aten.addmm.default) else 0]
        assert isinstance(rows, fx.Node)
        first = _token_dim(rows, tokens)
        return first == dim and dim != rows.meta["val"].dim() - 1
    if is_call(node, *REDUCTIONS):
        return _token_dim(node.args[0], tokens) == dim  # type: ignore[arg-type]
    if is_call(node, aten.cat.default):
        return all(_token_dim(n, tokens) == dim for n in node.all_input_nodes)
    return is_pointwise(node)


@graph_pass(numerics="exact", required=True)
def gather_last_tokens(graph: fx.Graph, context: PassContext) -> int:
    """Select the rows that need logits before everything that works row by row.

    Before::

        def f(x: "f32[T, 64]", norm: "weight f32[64]", w: "weight f32[128, 64]"):
            h = aios.rms_norm.default(x, norm, 1e-6, True)
            return aios.linear.default(h, w, None)

    After::

        def f(x: "f32[T, 64]", norm: "weight f32[64]", w: "weight f32[128, 64]",
              logit_rows: "input i64[R]"):
            rows = aten.index_select.default(x, 0, logit_rows)
            h = aios.rms_norm.default(rows, norm, 1e-6, True)
            return aios.linear.default(h, w, None)
    """
    if context.region:
        return 0
    match = _match(graph, context)
    if isinstance(match, Refusal):
        context.refuse(match)
    if not isinstance(match, Match):
        return 0
    _rewrite(graph, match, context)
    return 1


def _rewrite(graph: fx.Graph, match: Match, context: PassContext) -> None:
    rows = context.add_input(graph, "logit_rows", ("R",), torch.int64)
    tokens = new_size(context.module.mode, "T").node.expr
    replaced: dict[fx.Node, fx.Node] = {}
    num_rows: list[fx.Node] = []

    def on_rows(value: fx.Node) -> fx.Node:
        if value in replaced:
            return replaced[value]
        size = value.meta.get("val")
        if isinstance(size, torch.SymInt) and size.node.expr == tokens:
            if not num_rows:
                num_rows.append(context.call(graph, aten.sym_size.int, rows, 0, source=[value]))
            return num_rows[0]
        dim = _token_dim(value, tokens)
        if dim is not None:
            select = aten.index_select.default
            replaced[value] = context.call(graph, select, value, dim, rows, source=[match.logits])
        return replaced.get(value, value)

    output = graph.output_node()
    with graph.inserting_before(output):
        for node in match.tail:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), on_rows)
            replaced[node] = context.call(graph, node.target, *args, source=[node], **kwargs)
            _check(node, replaced[node])
        final = _flat_float32(graph, on_rows(match.logits), context)
    output.args = ((final, *outputs(graph)[1:]),)
    for node in reversed(match.tail):
        graph.erase_node(node)


def _check(old: fx.Node, new: fx.Node) -> None:
    if old.meta["val"].dim() != new.meta["val"].dim():
        raise PassError(
            f"{old.name} ({old.target}) works token by token on T rows but not on R rows",
            source_line=provenance.source_line(old),
        )


def _flat_float32(graph: fx.Graph, logits: fx.Node, context: PassContext) -> fx.Node:
    """Return logits as float32 [R, V]: batch dimensions of size 1 go, half precision is widened."""
    value = logits.meta["val"]
    extra = [i for i, s in enumerate(value.shape[:-1]) if isinstance(s, int) and s == 1]
    for i in reversed(extra):
        logits = context.call(graph, aten.squeeze.dim, logits, i, source=[logits])
    if logits.meta["val"].dim() != 2:
        raise PassError(
            f"logits have shape {tuple(value.shape)}, expected one row of the vocabulary a token",
            source_line=provenance.source_line(logits),
        )
    if value.dtype is not torch.float32:
        logits = context.call(
            graph, aten._to_copy.default, logits, source=[logits], dtype=torch.float32
        )
    return logits
