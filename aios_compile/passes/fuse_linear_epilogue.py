"""Apply what follows a matrix product, element by element, while its result is in registers.

Pays one launch, one write and one read of [T, N] for each tail: residuals, activations, the gated
activation of a merged gate and up (which halves what is written), scales, the soft cap of the
logits, casts. Embeddings take their scale or cast the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.fusion import fuse_nodes
from aios_compile.passes.context import PassContext, Refusal
from aios_compile.passes.fusion_groups import (
    is_call,
    is_pointwise,
    kernel_name,
    shape_of,
    tail,
)
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import SPLITS, part

aten = torch.ops.aten
aios = torch.ops.aios
BLOCK = 16  # columns that a packed weight keeps together: each half starts at a block
IN_REGISTERS = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool)
KINDS = {
    aios.linear.default: "linear",
    aios.bf16_linear.default: "bf16_linear",
    aios.quantized_linear.default: "quantized_linear",
    aten.embedding.default: "embedding",
}


class Match(NamedTuple):
    nodes: list[fx.Node]
    kind: str


def epilogue_of(root: fx.Node) -> Match | Refusal | None:
    """Return the linear and the tail that alone uses it, None where nothing pointwise follows."""
    line = provenance.place(root)
    halves = _halves(root)
    columns = shape_of(halves[0])[-1] if halves else 0
    if columns % BLOCK:
        return Refusal(f"halves of {columns} columns, no multiple of {BLOCK}", line)
    parts = {*halves, *(h.args[0] for h in halves)}

    def refusal(node: fx.Node, end: fx.Node) -> str | None:
        if node in parts:
            return None
        if not is_pointwise(node):
            return f"another user, {node.name}"
        expected = shape_of(halves[0] if halves else end)
        if shape_of(node) != expected:
            return f"{node.name} has another shape, {shape_of(node)} instead of {expected}"
        odd = [n for n in (node, *node.all_input_nodes) if not _fits_registers(n)]
        return f"{odd[0].name} has no 32-bit vector type" if odd else None

    nodes, reason = tail(root, refusal)
    if any(is_pointwise(node) for node in nodes):
        return Match(nodes, KINDS[root.target])  # type: ignore[index]
    if any(is_pointwise(user) for n in (root, *halves) for user in n.users):
        return Refusal(reason or "the tail's values never meet", line)
    return None


def _fits_registers(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.dtype in IN_REGISTERS


def _halves(root: fx.Node) -> list[fx.Node]:
    """Return the two halves of a merged gate and up (slices or a split), if all use is theirs."""
    size = shape_of(root)[-1]
    users = list(root.users)
    if len(users) == 1 and is_call(users[0], *SPLITS):
        users = list(users[0].users)
    pieces = [part(user) for user in users]
    if not isinstance(size, int) or size % 2 or len(pieces) != 2:
        return []
    bounds = {(p.start, p.stop, p.step) for p in pieces if p is not None}
    return users if bounds == {(0, size // 2, 1), (size // 2, size, 1)} else []


@graph_pass(numerics="exact")
def fuse_linear_epilogue(graph: fx.Graph, context: PassContext) -> int:
    """Fuse a linear (or embedding) with the pointwise tail that alone uses it.

    Before::

        def f(x: "f32[T, 64]", w: "weight f32[192, 64]"):
            y = aios.linear.default(x, w, None)
            gate = aten.slice.Tensor(y, 1, 0, 96)
            up = aten.slice.Tensor(y, 1, 96, 192)
            return aios.gated_activation.default(gate, up, "silu")

    After::

        def f(x: "f32[T, 64]", w: "weight f32[192, 64]"):
            @kernel("linear")
            def linear_gated_activation(x, w):
                y = aios.linear.default(x, w, None)
                gate = aten.slice.Tensor(y, 1, 0, 96)
                up = aten.slice.Tensor(y, 1, 96, 192)
                return aios.gated_activation.default(gate, up, "silu")

            return linear_gated_activation(x, w)
    """
    hits = 0
    for root in [n for n in graph.nodes if n.op == "call_function" and n.target in KINDS]:
        match = epilogue_of(root)
        if isinstance(match, Refusal):
            context.refuse(match)
        elif match is not None:
            fuse_nodes(graph, match.nodes, kernel_name(match.nodes), match.kind)
            hits += 1
    return hits
