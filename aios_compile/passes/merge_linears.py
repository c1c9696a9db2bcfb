"""One linear instead of several over the same input: what merge_qkv and merge_gate_up share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.ir import provenance
from aios_compile.ir.module import IRModule
from aios_compile.passes.context import PassContext, Refusal, fake_value

aten = torch.ops.aten
aios = torch.ops.aios
LINEARS = (aios.linear.default, aios.quantized_linear.default)


def refusal_to_merge(linears: Sequence[fx.Node], context: PassContext) -> Refusal | None:
    """Return why linears of one input cannot become one, or None."""
    line = provenance.place(linears[0])
    weights = [n.args[1] for n in linears]
    biases = [b for n in linears if (b := bias_of(n)) is not None]
    if not all(context.is_weight(w) for w in (*weights, *biases)):
        return Refusal("a weight is computed in the graph, not loaded", line)
    forms = sorted({form_of(n) or "floats" for n in linears})
    if len(forms) > 1:
        return Refusal(f"weights stored as {' and '.join(forms)}", line)
    if len({order_of(n) for n in linears}) > 1:
        return Refusal("columns that are shuffled among the groups in different orders", line)
    dtypes = {w.meta["val"].dtype for w in weights}  # type: ignore[union-attr]
    if len(dtypes) > 1:
        return Refusal(f"weights of different dtypes: {sorted(map(str, dtypes))}", line)
    if len({b.meta["val"].dtype for b in biases}) > 1:
        return Refusal("biases of different dtypes", line)
    if any(w.meta["val"].dim() != 2 for w in weights):  # type: ignore[union-attr]
        return Refusal("a weight that is not a matrix", line)
    return None


def bias_of(linear: fx.Node) -> fx.Node | None:
    at = 3 if linear.target is aios.quantized_linear.default else 2
    bias = linear.args[at] if len(linear.args) > at else linear.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) else None


def form_of(linear: fx.Node) -> str:
    """Return the format of a quantised linear's rows, "" for a linear of floats."""
    return str(linear.args[2]) if linear.target is aios.quantized_linear.default else ""


def order_of(linear: fx.Node) -> fx.Node | None:
    """Return the order of the columns of a quantised linear, None where they are in order."""
    order = linear.args[4] if form_of(linear) and len(linear.args) > 4 else None
    return order if isinstance(order, fx.Node) else None


def merge(graph: fx.Graph, linears: Sequence[fx.Node], name: str, context: PassContext) -> fx.Node:
    """Replace linears of one input by slices of one linear `name`; return that linear.

    Weights and biases are concatenated by the loader (missing biases are zeros).
    """
    x = linears[0].args[0]
    weights = [w for n in linears if isinstance(w := n.args[1], fx.Node)]
    assert len(weights) == len(linears)
    sizes = [int(w.meta["val"].shape[0]) for w in weights]
    weight = context.add_weight(graph, f"{name}_weight", weights, _stacked)
    bias = _merge_biases(graph, linears, sizes, f"{name}_bias", context)
    with graph.inserting_before(linears[0]):
        target, form = linears[0].target, form_of(linears[0])
        order = order_of(linears[0])
        values = (x, weight, form, bias) if form else (x, weight, bias)
        values = (*values, order) if order is not None else values
        merged = context.call(graph, target, *values, source=linears)
        last, start, slices = merged.meta["val"].dim() - 1, 0, []
        for linear, size in zip(linears, sizes):
            bounds = (last, start, start + size)
            slices.append(context.call(graph, aten.slice.Tensor, merged, *bounds, source=[linear]))
            start += size
    for linear, part in zip(linears, slices):
        linear.replace_all_uses_with(part)
        graph.erase_node(linear)
    refresh_strides(slices, context.module)
    return merged


def _merge_biases(
    graph: fx.Graph,
    linears: Sequence[fx.Node],
    sizes: Sequence[int],
    name: str,
    context: PassContext,
) -> fx.Node | None:
    biases = [bias_of(n) for n in linears]
    sources = [b for b in biases if b is not None]
    if not sources:
        return None

    def build(*given: Tensor) -> Tensor:
        left = list(given)
        parts = [given[0].new_zeros(n) if b is None else left.pop(0) for b, n in zip(biases, sizes)]
        return torch.cat(parts)

    return context.add_weight(graph, name, sources, build)


def refresh_strides(changed: Sequence[fx.Node], module: IRModule) -> None:
    """Recompute the fake values behind nodes whose strides changed."""
    pending = [u for n in changed for u in n.users]
    while pending:
        node = pending.pop(0)
        if node.op != "call_function":
            continue
        value = fake_value(node, module)
        if _layout(value) != _layout(node.meta["val"]):
            node.meta["val"] = value
            pending += node.users


def _layout(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_layout(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    sizes = [*value.shape, *value.stride(), value.storage_offset()]
    return [s if isinstance(s, int) else s.node.expr for s in sizes]


def _stacked(*weights: Tensor) -> Tensor:
    return torch.cat(weights)
