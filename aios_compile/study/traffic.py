"""The bytes that each kernel call of a decode step moves, counted from level 3.

One sequence, one token (T = S = R = 1): a weight once, of a looked-up table the rows that are asked
for, of experts the chosen ones; of a KV cache one token where it is written and, where attention
reads it, `context` tokens or the window if that is narrower; activations as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.ir import inputs
from aios_compile.ir.module import IRModule, body_of, is_kernel_call, placeholders
from aios_compile.ir.symbols import size_names
from aios_compile.passes.context import PassContext

_SIZES = {"T": 1, "S": 1, "R": 1, "NP": 1, "NB": 1, "NA": 1}
aten, aios = torch.ops.aten, torch.ops.aios
EXPERTS = (aios.expert_linear.default, aios.quantized_expert_linear.default)
LOOKUPS = (
    aten.embedding.default,
    aten.index.Tensor,
    aten.index_select.default,
    aios.quantized_embedding.default,
)
WINDOW = 7  # the argument of aios.paged_attention


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch by what they are."""

    weights: int = 0
    kv: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.weights + other.weights, self.kv + other.kv, self.activations + other.activations
        )

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.weights * times, self.kv * times, self.activations * times)


@dataclass(frozen=True)
class CallCost:
    """One kernel call: the region it stands in ("" for the outer graph), its launches a step."""

    call: fx.Node
    region: str
    times: int
    traffic: Traffic


def call_costs(module: IRModule, context: int = 256) -> list[CallCost]:
    """Count every kernel call of a level-3 program, in the order of the graphs."""
    states = {
        _shape(module, n.meta["val"])
        for n in placeholders(module.root.graph)
        if n.name in module.states
    }
    costs = []
    for name, graph_module in module.graphs().items():
        times = len(module.calls(name)) if name else 1
        view = PassContext(module, name)
        for call in graph_module.graph.nodes:
            if is_kernel_call(call):
                costs.append(CallCost(call, name, times, _traffic(view, call, states, context)))
    return costs


def main_reader(module: IRModule, cost: CallCost) -> fx.Node | None:
    """Return the op in a kernel that reads the most weights, if those are most of its traffic."""
    view = PassContext(module, cost.region)
    bound = zip(placeholders(body_of(cost.call).graph), cost.call.args)
    weights = [(_weight_bytes(module, h), h) for h, a in bound if view.is_weight(a) and h.users]
    if not weights or 2 * cost.traffic.weights <= cost.traffic.total:
        return None
    _, largest = max(weights, key=lambda pair: pair[0])
    return next(iter(largest.users))


def _traffic(
    view: PassContext, call: fx.Node, states: set[tuple[int | str, ...]], context: int
) -> Traffic:
    body = body_of(call)
    module = view.module
    read_tokens = _read_tokens(body.graph, context)
    weights = kv = activations = 0
    for holder, argument in zip(placeholders(body.graph), call.args):
        value = holder.meta["val"]
        if not isinstance(value, Tensor):
            continue
        if _shape(module, value) in states:
            kv += _token_bytes(value) * read_tokens
        elif view.is_weight(argument):
            weights += _weight_bytes(module, holder)
        else:
            activations += _bytes(module, value)
    results = (
        call.meta["val"] if isinstance(call.meta["val"], (tuple, list)) else [call.meta["val"]]
    )
    for value in results:
        if _shape(module, value) in states:
            kv += _token_bytes(value)
        else:
            activations += _bytes(module, value)
    return Traffic(weights, kv, activations)


def _read_tokens(body: fx.Graph, context: int) -> int:
    """Return the tokens of a cache that the attention of a kernel reads; 0 without attention."""
    found = body.find_nodes(op="call_function", target=aios.paged_attention.default)
    windows = [n.args[WINDOW] if len(n.args) > WINDOW else None for n in found]
    return max((min(context, w) if isinstance(w, int) else context for w in windows), default=0)


def _weight_bytes(module: IRModule, weight: fx.Node) -> int:
    """Return what a kernel reads of a weight: all, or the rows and experts that are chosen."""
    value, users = weight.meta["val"], list(weight.users)
    whole = _bytes(module, value)
    if users and all(n.target in LOOKUPS and n.args[0] is weight for n in users):
        rows = sum(_looked_up(module, n) for n in users)
        return min(whole, rows)
    if users and all(n.target in EXPERTS for n in users):
        num_chosen = _count(module, users[0].args[2])
        return min(whole, whole // int(value.shape[0]) * num_chosen)
    return whole


def _looked_up(module: IRModule, node: fx.Node) -> int:
    """Return the bytes of a table that a lookup reads: codes of a row, or what it returns."""
    table: Any = node.args[0]
    if node.target is aios.quantized_embedding.default:
        return _count(module, node.args[1]) * int(table.meta["val"].shape[-1])
    return _count(module, node) * int(table.meta["val"].element_size())


def _count(module: IRModule, node: Any) -> int:
    """Return the elements of a value in a step of one token."""
    value: Tensor = node.meta["val"]
    return _bytes(module, value) // value.element_size()


def _shape(module: IRModule, value: Any) -> tuple[int | str, ...]:
    return inputs.shape_of(value, size_names(module.mode))


def _bytes(module: IRModule, value: Tensor) -> int:
    sizes = [inputs.size(s, _SIZES) for s in _shape(module, value)]
    return math.prod(sizes) * value.element_size()


def _token_bytes(value: Tensor) -> int:
    """Return the bytes of one token in a cache [pages, heads, ..page and width..]."""
    page = inputs.PAGE_SIZE
    return math.prod(int(s) for s in value.shape[1:]) // page * value.element_size()
