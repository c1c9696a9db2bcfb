"""What each optional pass is worth: launches, bytes moved a token and nodes with the pass left out.

Counted from level 3, nothing is run or timed. Bytes are those of the operands of every kernel call
in a decode step of one sequence (T = S = R = 1): a weight once, a looked-up table one row, a KV
cache one token where it is written and `context` tokens where attention reads it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.errors import AiosError
from aios_compile.ir import inputs, snapshot
from aios_compile.ir.module import IRModule, body_of, is_kernel_call, placeholders
from aios_compile.ir.symbols import size_names
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.runner import Stage, run_pipeline

_SIZES = {"T": 1, "S": 1, "R": 1, "NP": 1, "NB": 1, "NA": 1}
aten, aios = torch.ops.aten, torch.ops.aios


@dataclass(frozen=True)
class Cost:
    """Counts of one level-3 program. launches_a_layer: of the first region; launches: of a step."""

    launches_a_layer: int
    launches: int
    bytes_a_token: int
    nodes: int


@dataclass(frozen=True)
class Ablation:
    """The program with everything, and without each optional pass (a text: why it cannot be)."""

    everything: Cost
    without: dict[str, Cost | str]

    def __str__(self) -> str:
        head = f"{'without':<34}{'launches a layer':>17}{'in all':>8}{'MB a token':>12}{'nodes':>7}"
        lines = [head, "-" * len(head), _line("(all passes)", self.everything, self.everything)]
        lines += [_line(name, cost, self.everything) for name, cost in self.without.items()]
        return "\n".join(lines)

    def idle(self) -> tuple[str, ...]:
        """Return the passes that change none of the counts here."""
        return tuple(name for name, cost in self.without.items() if cost == self.everything)


def _line(name: str, cost: Cost | str, base: Cost) -> str:
    if isinstance(cost, str):
        return f"{name:<34}  {cost}"[:100]
    launches = f"{cost.launches_a_layer:>17}{cost.launches:>8}"
    same = "  no change" if cost == base and name != "(all passes)" else ""
    return f"{name:<34}{launches}{cost.bytes_a_token / 1e6:>12.3f}{cost.nodes:>7}{same}"


def ablate(
    captured: IRModule,
    stages: Sequence[Stage],
    options: PassOptions,
    *,
    context: int = 256,
    only: Collection[str] | None = None,
) -> Ablation:
    """Run the pipeline on copies of level 1: once whole, once without each optional pass.

    only: the passes to leave out; None for every optional one.
    """

    def cost(disabled: tuple[str, ...]) -> Cost:
        module = snapshot.take(captured)
        run_pipeline(module, stages, options, disabled=disabled, verify=0)
        return cost_of(module, context)

    everything = cost(())
    without: dict[str, Cost | str] = {}
    for function in [p for stage in stages for p in stage.passes]:
        info = info_of(function)
        wanted = only is None or info.name in only
        if info.required or not wanted or info.target not in ("", options.target):
            continue
        try:
            without[info.name] = cost((info.name,))
        except AiosError as error:
            without[info.name] = f"needed: {error.message}"
    return Ablation(everything, without)


def cost_of(module: IRModule, context: int = 256) -> Cost:
    """Count a level-3 program; `context` tokens are in the cache."""
    shapes = {
        _shape(module, n.meta["val"])
        for n in placeholders(module.root.graph)
        if n.name in module.states
    }
    launches, moved, per_layer = 0, 0, 0
    for name, graph_module in module.graphs().items():
        times = len(module.calls(name)) if name else 1
        calls = [n for n in graph_module.graph.nodes if is_kernel_call(n)]
        if name and not per_layer:
            per_layer = len(calls)
        launches += times * len(calls)
        moved += times * sum(_call_bytes(module, n, shapes, context) for n in calls)
    return Cost(per_layer, launches, moved, snapshot.count_nodes(module))


def _call_bytes(
    module: IRModule, call: fx.Node, states: set[tuple[int | str, ...]], context: int
) -> int:
    body = body_of(call)
    reads = any(n.target is aios.paged_attention.default for n in body.graph.nodes)
    lookups = body.graph.find_nodes(op="call_function", target=aten.embedding.default)
    tables = {str(n.args[0]) for n in lookups}
    total = 0
    for holder in placeholders(body.graph):
        value = holder.meta["val"]
        if _shape(module, value) in states:
            total += _token_bytes(value) * (context if reads else 0)
        elif holder.name in tables:
            total += value.shape[-1] * value.element_size()
        else:
            total += _bytes(module, value)
    results = (
        call.meta["val"] if isinstance(call.meta["val"], (tuple, list)) else [call.meta["val"]]
    )
    for value in results:
        is_state = _shape(module, value) in states
        total += _token_bytes(value) if is_state else _bytes(module, value)
    return total


def _shape(module: IRModule, value: Any) -> tuple[int | str, ...]:
    return inputs.shape_of(value, size_names(module.mode))


def _bytes(module: IRModule, value: Tensor) -> int:
    sizes = [inputs.size(s, _SIZES) for s in _shape(module, value)]
    return math.prod(sizes) * value.element_size()


def _token_bytes(value: Tensor) -> int:
    """Return the bytes of one token in a cache [pages, heads, ..page and width..]."""
    page = inputs.PAGE_SIZE
    return math.prod(int(s) for s in value.shape[1:]) // page * value.element_size()
