"""Add the residual and normalise the sum in one kernel.

Pays one launch, one write and one read of x a layer: the sum is in registers when its square is
needed. The mirrored form, a normalised branch added to the residual (Gemma 2 and 3, OLMo 2), saves
the same. A chain norm, add, norm keeps its first norm outside: one pass over the row a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.fusion import fuse_nodes, is_convex
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fusion_groups import NORMS, is_call, kernel_name, shape_of
from aios_compile.passes.graph_pass import graph_pass

aten = torch.ops.aten


class Match(NamedTuple):
    first: fx.Node
    second: fx.Node


def _match(norm: fx.Node) -> Match | Refusal | None:
    """Match add -> norm; the sum may have other users (it becomes a second output)."""
    add = norm.args[0]
    if isinstance(add, fx.Node) and add.op == "placeholder":
        reason = "what it normalises is summed outside of the layer (or of the model)"
        return Refusal(reason, provenance.place(norm))
    if not is_call(add, aten.add.Tensor):
        return None
    assert isinstance(add, fx.Node)
    refusal = _refusal_of_add(add)
    if refusal:
        return refusal
    if not is_convex([add, norm]):
        return Refusal("the norm's weight depends on the sum", provenance.place(norm))
    return Match(add, norm)


def _match_mirrored(norm: fx.Node) -> Match | Refusal | None:
    """Match norm -> add; the norm must have no other user."""
    adds = [u for u in norm.users if is_call(u, aten.add.Tensor)]
    if not adds:
        return None
    if len(norm.users) > 1:
        return Refusal("the normalised branch has another user", provenance.place(norm))
    return _refusal_of_add(adds[0]) or Match(norm, adds[0])


def _refusal_of_add(add: fx.Node) -> Refusal | None:
    line = provenance.place(add)
    a, b = add.args[0], add.args[1]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return Refusal("the sum adds a number, not a residual", line)
    if shape_of(a) != shape_of(b):
        return Refusal("the summands have different shapes", line)
    if a.meta["val"].dtype != b.meta["val"].dtype:
        return Refusal("the summands have different dtypes", line)
    if add.kwargs.get("alpha", 1) != 1:
        return Refusal("the sum is scaled by alpha", line)
    return None


@graph_pass(numerics="exact")
def fuse_add_rms_norm(graph: fx.Graph, context: PassContext) -> int:
    """Fuse the residual sum with the norm that reads it (or the norm with the sum that reads it).

    Before::

        def f(x: "f32[T, 64]", h: "f32[T, 64]", w: "weight f32[64]"):
            y = aten.add.Tensor(x, h)
            return aios.rms_norm.default(y, w, 1e-6, True), y

    After::

        def f(x: "f32[T, 64]", h: "f32[T, 64]", w: "weight f32[64]"):
            @kernel("row_reduction")
            def add_rms_norm(x, h, w):
                y = aten.add.Tensor(x, h)
                return y, aios.rms_norm.default(y, w, 1e-6, True)

            y, normed = add_rms_norm(x, h, w)
            return normed, y
    """
    fused, hits = set[fx.Node](), 0
    norms = [n for n in graph.nodes if is_call(n, *NORMS)]
    for find in (_match, _match_mirrored):
        for norm in norms:
            match = None if norm in fused else find(norm)
            if isinstance(match, Refusal):
                context.refuse(match)
            elif match is not None:
                fuse_nodes(graph, match, kernel_name(match), "row_reduction")
                fused.update(match)
                hits += 1
    return hits
