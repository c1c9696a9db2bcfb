"""Hold results against float64: the error may be 4 times that of eager float32.

Where eager happens to be more exact than its operations are, a second opinion decides: eager runs
several times with each value perturbed by a relative 2**-24, and the largest error counts. That is
stochastic arithmetic (Parker, Monte Carlo Arithmetic, 1997; Vignes, CESTAC, 1978): it measures how
ill-conditioned a program is, and whether a comparison hangs on a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from aios_compile.ir import evaluate, snapshot
from aios_compile.ir.module import IRModule, placeholders
from aios_compile.passes.measure import FLOOR_ROUNDINGS

aten = torch.ops.aten
FACTOR = 4.0  # times eager's own error
ROUNDING = torch.finfo(torch.float32).eps
OPINIONS = 6
# Triton multiplies float32 by bf16 weights and by codes as two parts of bf16: they hold 16 bits.
TWO_PARTS = 2.0**-16
# Triton's attention over codes multiplies one part of bf16, and so does level 3 here: a probability
# next to a tie may still round the other way, by one step of bf16.
STEP = 2.0**-8
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


@dataclass(frozen=True)
class Verdict:
    """How far results are from float64, relative to the largest value, and how far they may be."""

    output: int
    error: float
    budget: float

    @property
    def holds(self) -> bool:
        return self.error <= self.budget


def compare(
    oracle: Sequence[Tensor], eager: Sequence[Tensor], got: Sequence[Tensor]
) -> list[Verdict]:
    """Judge each output."""
    return [_compare(i, *three) for i, three in enumerate(zip(oracle, eager, got))]


def _compare(index: int, oracle: Tensor, eager: Tensor, got: Tensor) -> Verdict:
    if got.shape != oracle.shape:
        return Verdict(index, math.inf, 0.0)
    if not oracle.is_floating_point():
        wrong = ((got != oracle) & (eager == oracle)).any()  # rounding may decide an integer
        return Verdict(index, math.inf if bool(wrong) else 0.0, 0.0)
    finite = oracle[oracle.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    scale = scale or 1.0
    floor = FLOOR_ROUNDINGS * ROUNDING
    wide = eager.double()  # float32 overflows where it must: there nothing is asked
    kept = (oracle.isfinite() & wide.isfinite()) | _same(wide, oracle)
    error = _distance(got, oracle, kept) / scale
    return Verdict(index, error, FACTOR * _distance(eager, oracle, kept) / scale + floor)


def _distance(value: Tensor, oracle: Tensor, kept: Tensor) -> float:
    """Return the largest difference; infinite where one of the two is no number."""
    value, oracle = value.double()[kept], oracle.double()[kept]
    gap = (value - oracle).abs().masked_fill(_same(value, oracle), 0.0)
    return float(torch.nan_to_num(gap, nan=math.inf).max()) if gap.numel() else 0.0


def _same(value: Tensor, oracle: Tensor) -> Tensor:
    return (value == oracle) | (value.isnan() & oracle.isnan())


def run_eager(module: IRModule, values: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Run level 1 with all floating-point values in `dtype`; return its outputs."""
    given = []
    for node in placeholders(module.root.graph):
        value = values[node.name]
        given.append(value.to(dtype) if value.is_floating_point() else value)
    with torch.no_grad():
        found = evaluate.call(module.root, given, computed_in=dtype)
    return list(found)


def second_opinion(
    module: IRModule,
    values: Mapping[str, Tensor],
    oracle: Sequence[Tensor],
    multiplied: float = 0.0,
) -> list[float]:
    """Return for each output the largest relative error of perturbed float32 runs.

    multiplied: by how much what a matrix product reads is moved beside that, relative.
    """
    worst = [0.0] * len(oracle)
    for seed in range(OPINIONS):
        noisy = perturbed(module, seed, multiplied=multiplied)
        found = run_eager(noisy, values, torch.float32)
        worst = [max(w, v.error) for w, v in zip(worst, compare(oracle, found, found))]
    return worst


def perturbed(
    module: IRModule, seed: int, rounding: float = ROUNDING, multiplied: float = 0.0
) -> IRModule:
    """Return a copy whose float values are each moved by up to a rounding (of float32)."""
    generator = torch.Generator().manual_seed(seed)

    def perturb(value: Tensor, by: float = rounding) -> Tensor:
        noise = torch.rand(value.shape, generator=generator) * 2 - 1
        return value * (1 + noise * by)

    noisy = snapshot.take(module)
    for graph_module in noisy.graphs().values():
        _perturb_each(graph_module.graph, perturb)
        if multiplied:
            _perturb_factors(graph_module.graph, perturb, multiplied)
    return noisy


def _perturb_factors(graph: fx.Graph, perturb: Callable[..., Tensor], by: float) -> None:
    """Let matrix products read perturbed factors; what addmm adds is left alone."""
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in PRODUCTS]:
        with graph.inserting_before(node):
            factors = [graph.call_function(perturb, (x, by)) for x in node.args[-2:]]
        node.args = (*node.args[:-2], *factors)


def _perturb_each(graph: fx.Graph, perturb: Callable[[Tensor], Tensor]) -> None:
    """Let every reader of a float value read a perturbed one."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        floats = isinstance(value, Tensor) and value.is_floating_point()
        floats = floats and value.dtype.itemsize > 1  # codes are what they are
        if floats and node.op in ("call_function", "placeholder"):
            with graph.inserting_after(node):
                other = graph.call_function(perturb, (node,))
            other.meta = dict(node.meta)
            node.replace_all_uses_with(other, lambda user, other=other: user is not other)
