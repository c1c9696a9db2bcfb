"""Random programs over the op table, as plain Python functions that any tracer can take.

A program is a list of instructions over a growing list of values; values are [T, D], [T, 1],
[T, H, E] or [T, k] float32. Everything is deterministic in the drawn instructions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": lambda x: torch.exp(x.clamp(-8, 8)),
    "log": lambda x: torch.log(x.abs() + 0.1),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x * x + 0.5),
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "erf": torch.erf,
    "clamp": lambda x: x.clamp(-0.7, 1.3),
    "square": lambda x: x.pow(2),
    "cube": lambda x: x.pow(3),
    "reciprocal": lambda x: 1.0 / (x.abs() + 0.3),
    "where": lambda x: torch.where(x > 0.1, x, 0.25 * x - 1.0),
    "affine": lambda x: x * 1.5 - 0.3,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x / (y.abs() + 0.5),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "swiglu": lambda x, y: F.silu(x) * y,
    "select": lambda x, y: torch.where(x < y, x, y * 0.5),
}
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1, keepdim=True) / x.shape[-1],
    "amax": lambda x: x.amax(-1, keepdim=True),
    "amin": lambda x: x.amin(-1, keepdim=True),
    "rms": lambda x: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
}
ROW: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "rms_norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
}
MOVE: dict[str, Callable[[Tensor], Tensor]] = {
    "rotate": lambda x: torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1),
    "first_half": lambda x: x[..., : (x.shape[-1] + 1) // 2],
    "odd": lambda x: x[..., 1::2] if x.shape[-1] > 1 else x,
    "doubled": lambda x: torch.cat((x, x * 0.5), -1),
    "top": lambda x: torch.topk(x, min(3, x.shape[-1])).values,
    "lowest": lambda x: torch.topk(x, (x.shape[-1] + 1) // 2, largest=False).values,
    "sorted": lambda x: torch.sort(x, -1).values,
    "heads_last": lambda x: (
        x.unflatten(-1, (2, x.shape[-1] // 2)).transpose(-1, -2).reshape(x.shape)
        if x.shape[-1] % 2 == 0
        else x
    ),
}


@dataclass(frozen=True)
class Step:
    """One instruction: an op name, and the values it reads (counted from the newest)."""

    kind: str
    name: str
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """Instructions, the width D of the inputs, the widths of linears, outputs wanted."""

    width: int
    steps: tuple[Step, ...]
    num_outputs: int

    def function(self) -> Callable[..., Any]:
        """Return f(x, y, w0, w1, ...) with annotated parameters, as tests.passes.helpers wants."""
        widths = self.linear_widths()

        def run(*args: Tensor) -> tuple[Tensor, ...]:
            values, weights = list(args[:2]), list(args[2:])
            for step in self.steps:
                values.append(self.apply(step, values, weights))
            return tuple(values[-self.num_outputs :])

        names = {"x": f"f32[T, {self.width}]", "y": f"f32[T, {self.width}]"}
        names |= {f"w{i}": f"weight f32[{n}, {k}]" for i, (n, k) in enumerate(widths)}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(n, kind, annotation=a) for n, a in names.items()]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    def linear_widths(self) -> list[tuple[int, int]]:
        """Return (N, K) of each linear, by running the program on shapes."""
        found: list[tuple[int, int]] = []
        values = [torch.zeros(2, self.width), torch.zeros(2, self.width)]
        for step in self.steps:
            if step.kind == "linear":
                source = values[-1 - step.sources[0] % len(values)]
                found.append((int(step.name), source.shape[-1]))
                values.append(torch.zeros(2, int(step.name)))
            else:
                values.append(self.apply(step, values, []))
        return found

    @staticmethod
    def apply(step: Step, values: list[Tensor], weights: list[Tensor]) -> Tensor:
        sources = [values[-1 - s % len(values)] for s in step.sources]
        x = sources[0]
        if step.kind == "unary":
            return UNARY[step.name](x)
        if step.kind == "reduce":
            return REDUCE[step.name](x)
        if step.kind == "row":
            return ROW[step.name](x)
        if step.kind == "move":
            return MOVE[step.name](x)
        if step.kind == "linear":
            w = weights.pop(0)
            return F.linear(x, w) / math.sqrt(x.shape[-1])
        y = sources[1]
        fits = y.shape[-1] in (1, x.shape[-1]) or x.shape[-1] == 1
        return BINARY[step.name](x, y if fits else x)


def _step(kind: str, names: Any, arity: int = 1) -> st.SearchStrategy[Step]:
    sources = st.tuples(*[st.integers(0, 3)] * arity)
    return st.builds(Step, st.just(kind), st.sampled_from(list(names)), sources)


steps = st.one_of(
    _step("unary", UNARY),
    _step("unary", UNARY),
    _step("binary", BINARY, 2),
    _step("binary", BINARY, 2),
    _step("reduce", REDUCE),
    _step("row", ROW),
    _step("move", MOVE),
    _step("linear", ["16", "33", "48"]),
)
programs = st.builds(
    Program,
    st.sampled_from([1, 2, 7, 16, 24, 33, 64]),
    st.lists(steps, min_size=1, max_size=10).map(tuple),
    st.integers(1, 3),
)
