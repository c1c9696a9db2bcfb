"""A random program: Python text over torch functions, so that a failure is a script to read.

A program is one function. Its parameters are annotated as trace_function.py reads them; each
statement calls torch, F, aten or aios functions (what passes/example_reader.py evaluates).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aios_compile.ir import ops
from aios_compile.passes.example_reader import evaluate, read
from aios_compile.passes.examples import DTYPES

assert ops.TABLE, "the op table must be registered"
SCOPE: Mapping[str, Any] = {
    "torch": torch,
    "F": F,
    "aten": torch.ops.aten,
    "aios": torch.ops.aios,
}
Size = int | str
Shape = tuple[Size, ...]
SAMPLE_TOKENS = (3, 5)  # a dimension that differs between the two depends on T


class Rejected(Exception):
    """An expression that torch refuses, or whose values are of no use: try another one."""


@dataclass(frozen=True)
class Parameter:
    """A parameter. kind: "activation", "weight" or "input". below: integers are 0 .. below - 1.

    scale: of its normal values; half of them are zero where it is negative.
    """

    name: str
    shape: Shape
    dtype: str = "f32"
    kind: str = "activation"
    below: int = 2
    scale: float = 1.0

    @property
    def annotation(self) -> str:
        """Return what trace_function.py reads: "weight f32[64, 64]"."""
        kind = "" if self.kind == "activation" else f"{self.kind} "
        return f"{kind}{self.dtype}[{', '.join(map(str, self.shape))}]"

    def value(self, num_tokens: int, seed: int) -> Tensor:
        """Return its seeded value. Row t of an activation is the same for every `num_tokens`."""
        if self.name in ("positions", "token_positions"):
            return torch.arange(num_tokens)
        shape = [s if isinstance(s, int) else num_tokens for s in self.shape]
        along = self.shape.index("T") if "T" in self.shape else None
        most = [64 if i == along else s for i, s in enumerate(shape)]
        generator = torch.Generator().manual_seed(hash_of(self.name, seed))
        dtype = DTYPES[self.dtype]
        if not dtype.is_floating_point:
            drawn = torch.randint(0, self.below, most, generator=generator).to(dtype)
        else:
            drawn = torch.randn(most, generator=generator, dtype=torch.float64) * abs(self.scale)
            if self.scale < 0:
                drawn *= torch.rand(most, generator=generator) < 0.5
            drawn = drawn.to(dtype)
        if along is not None:
            assert num_tokens <= 64, "values are drawn for at most 64 tokens"
            drawn = drawn.narrow(along, 0, num_tokens)
        return drawn.contiguous()


def hash_of(name: str, seed: int) -> int:
    """Return a seed for one name (the same in every process)."""
    import zlib

    return zlib.crc32(f"{seed}/{name}".encode())


@dataclass(frozen=True)
class Statement:
    """`name = expression`."""

    name: str
    expression: str


@dataclass(frozen=True)
class Program:
    """Parameters, statements and the names that are returned."""

    parameters: tuple[Parameter, ...]
    statements: tuple[Statement, ...]
    results: tuple[str, ...]

    def text(self) -> str:
        """Return the function as Python."""
        given = ",\n    ".join(f'{p.name}: "{p.annotation}"' for p in self.parameters)
        lines = [f"def program(\n    {given},\n):"]
        lines += [f"    {s.name} = {s.expression}" for s in self.statements]
        returned = ", ".join(self.results)
        return "\n".join([*lines, f"    return ({returned},)"]) + "\n"

    def function(self) -> Callable[..., Any]:
        """Return the function, annotated for trace_function.py."""
        inner = read(self.text(), SCOPE)

        def run(*args: Any) -> Any:
            return inner(*args)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            inspect.Parameter(p.name, kind, annotation=p.annotation) for p in self.parameters
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    def values(self, num_tokens: int, seed: int) -> dict[str, Tensor]:
        """Return seeded values of all parameters by name."""
        return {p.name: p.value(num_tokens, seed) for p in self.parameters}

    def without_dead(self) -> Program:
        """Return the program without the statements and parameters that no result needs."""
        needed = set(self.results)
        kept: list[Statement] = []
        for statement in reversed(self.statements):
            if statement.name in needed:
                kept.append(statement)
                needed |= names_in(statement.expression)
        parameters = tuple(p for p in self.parameters if p.name in needed)
        if not parameters:
            parameters = self.parameters[:1]
        return Program(parameters, tuple(reversed(kept)), self.results)


def names_in(expression: str) -> set[str]:
    """Return the variables that an expression reads."""
    import ast

    found = {n.id for n in ast.walk(ast.parse(expression)) if isinstance(n, ast.Name)}
    return found - set(SCOPE)


def run_expression(expression: str, values: Mapping[str, Any]) -> Any:
    """Evaluate an expression over values by name. Raises Rejected for what torch refuses."""
    try:
        with torch.no_grad():
            return evaluate(expression, {**SCOPE, **values})
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        raise Rejected(f"{expression}: {error}") from error
