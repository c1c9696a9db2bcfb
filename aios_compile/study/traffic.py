"""The bytes that each kernel call of a decode step moves, counted from level 3.

One sequence, one token (T = S = R = 1): a weight once, a looked-up table one row, a KV cache one
token where it is written and `context` tokens where attention reads it, activations as they are.
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


def _traffic(
    view: PassContext, call: fx.Node, states: set[tuple[int | str, ...]], context: int
) -> Traffic:
    body = body_of(call)
    module = view.module
    reads = any(n.target is aios.paged_attention.default for n in body.graph.nodes)
    lookups = body.graph.find_nodes(op="call_function", target=aten.embedding.default)
    tables = {str(n.args[0]) for n in lookups}
    weights = kv = activations = 0
    for holder, argument in zip(placeholders(body.graph), call.args):
        value = holder.meta["val"]
        if not isinstance(value, Tensor):
            continue
        if _shape(module, value) in states:
            kv += _token_bytes(value) * (context if reads else 0)
        elif holder.name in tables:
            weights += value.shape[-1] * value.element_size()
        elif view.is_weight(argument):
            weights += _bytes(module, value)
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


def _shape(module: IRModule, value: Any) -> tuple[int | str, ...]:
    return inputs.shape_of(value, size_names(module.mode))


def _bytes(module: IRModule, value: Tensor) -> int:
    sizes = [inputs.size(s, _SIZES) for s in _shape(module, value)]
    return math.prod(sizes) * value.element_size()


def _token_bytes(value: Tensor) -> int:
    """Return the bytes of one token in a cache [pages, heads, ..page and width..]."""
    page = inputs.PAGE_SIZE
    return math.prod(int(s) for s in value.shape[1:]) // page * value.element_size()
