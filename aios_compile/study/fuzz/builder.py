"""Grow a program statement by statement; every value is known at two numbers of tokens."""

from __future__ import annotations

import ast
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aios_compile.passes.examples import DTYPES
from aios_compile.study.fuzz.program import (
    SAMPLE_TOKENS,
    Parameter,
    Program,
    Rejected,
    Shape,
    Statement,
    run_expression,
)

LARGEST = 1e5  # values beyond say nothing about a graph: everything is rounding
MAX_ELEMENTS = 1 << 15
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Builder:
    """Parameters and statements so far. Expressions that torch refuses raise Rejected."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.parameters: list[Parameter] = []
        self.statements: list[Statement] = []
        self.samples: tuple[dict[str, Any], ...] = ({}, {})
        self.largest = LARGEST
        self.results: list[str] = []

    def parameter(
        self,
        shape: Shape,
        dtype: str = "f32",
        kind: str = "activation",
        name: str = "",
        below: int = 2,
        scale: float = 1.0,
    ) -> str:
        """Add a parameter; return its name."""
        name = name or f"{'w' if kind == 'weight' else 'x'}{len(self.parameters)}"
        if any(p.name == name for p in self.parameters):
            return name
        parameter = Parameter(name, shape, dtype, kind, below, scale)
        self.parameters.append(parameter)
        for tokens, known in zip(SAMPLE_TOKENS, self.samples):
            known[name] = parameter.value(tokens, 0)
        return name

    def weight(self, *shape: int, dtype: str = "f32") -> str:
        """Add a weight whose products have about the size of what they multiply."""
        gain = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
        return self.parameter(shape, dtype, "weight", scale=gain)

    def add(self, expression: str) -> str:
        """Add a statement; return the name of its value. Raises Rejected."""
        values = [run_expression(expression, known) for known in self.samples]
        for value in values:
            _check(expression, value, self.largest)
        name = f"v{len(self.statements)}"
        self.statements.append(Statement(name, expression))
        for known, value in zip(self.samples, values):
            known[name] = value
        return name

    def shape(self, name: str) -> Shape:
        """Return a value's shape; "T" for the tokens, "?" for what depends on them otherwise."""
        first, second = (known[name].shape for known in self.samples)
        return tuple(_size(a, b) for a, b in zip(first, second))

    def dtype(self, name: str) -> str:
        """Return the short name of a value's dtype."""
        return NAMES[self.samples[0][name].dtype]

    def tensors(self, *dtypes: str) -> list[str]:
        """Return the values and activations, newest last, of some dtypes (all floats)."""
        wanted = dtypes or ("f32", "bf16", "f16")
        weights = {p.name for p in self.parameters if p.kind == "weight"}
        known = self.samples[0]
        return [
            n
            for n, v in known.items()
            if isinstance(v, Tensor) and n not in weights and NAMES[v.dtype] in wanted
        ]

    def program(self) -> Program:
        """Return the program that gives out `results` (the newest value without any)."""
        results = self.results or self.tensors()[-1:]
        return Program(
            tuple(self.parameters), tuple(self.statements), tuple(results)
        ).without_dead()


def _size(a: int, b: int) -> int | str:
    if a == b:
        return a
    return "T" if (a, b) == SAMPLE_TOKENS else "?"


def _check(expression: str, value: Any, largest: float) -> None:
    for item in value if isinstance(value, (tuple, list)) else [value]:
        if not isinstance(item, Tensor) or item.is_complex() or item.numel() == 0:
            raise Rejected(f"{expression}: not a tensor of numbers")
        if item.numel() > MAX_ELEMENTS or item.dtype not in NAMES:
            raise Rejected(f"{expression}: too large, or of an unknown dtype")
        if item.is_floating_point() and not bool((item.abs() <= largest).all()):
            raise Rejected(f"{expression}: values beyond {largest:g}")


@dataclass(frozen=True)
class Pattern:
    """What one pass looks for, in one spelling: a function over named sizes.

    steps: it runs through all stages, in batches over pages. stored: a format in which its weights
    are stored; quantization: one to which they are quantised. rounded: activations are
    rounded to bf16 before they meet bf16 weights. kv: the codes that caches hold.
    """

    pass_name: str
    name: str
    text: str
    steps: bool = False
    stored: str = ""
    quantization: str = ""
    rounded: bool = False
    kv: str = ""

    @property
    def lossy(self) -> bool:
        """Return whether its pass rounds what it is given."""
        return bool(self.stored or self.quantization or self.rounded or self.kv)

    def parameters(self, sizes: Mapping[str, int]) -> list[Parameter]:
        """Return the parameters for some sizes. "i64[T] < V": whole numbers below V."""
        found = []
        for argument in self._function().args.args:
            assert argument.annotation is not None
            text = ast.literal_eval(argument.annotation)
            found.append(_parameter(argument.arg, text, sizes))
        return found

    def _function(self) -> ast.FunctionDef:
        (node,) = ast.parse(self.text).body
        assert isinstance(node, ast.FunctionDef)
        return node

    def plant(self, b: Builder, given: Mapping[str, str], sizes: Mapping[str, int]) -> Planted:
        """Add the pattern's statements to a program, its parameters bound to the values `given`."""
        b.largest = math.inf  # what a mask hides is -1e30
        try:
            return self._plant(b, dict(given), sizes)
        finally:
            b.largest = LARGEST

    def _plant(self, b: Builder, names: dict[str, str], sizes: Mapping[str, int]) -> Planted:
        inner: list[str] = []
        for statement in self._function().body:
            if isinstance(statement, ast.Return):
                assert statement.value is not None
                values = statement.value
                parts = values.elts if isinstance(values, ast.Tuple) else [values]
                results = [self._value(b, part, names, sizes) for part in parts]
                return Planted(tuple(results), tuple(n for n in inner if n not in results))
            assert isinstance(statement, ast.Assign)
            (target,) = statement.targets
            if isinstance(target, ast.Tuple):
                whole = self._value(b, statement.value, names, sizes)
                for i, part in enumerate(target.elts):
                    names[part.id] = b.add(f"{whole}[{i}]")  # type: ignore[attr-defined]
            else:
                assert isinstance(target, ast.Name)
                names[target.id] = self._value(b, statement.value, names, sizes)
                inner.append(names[target.id])
        raise AssertionError(f"{self.name} returns nothing")

    def _value(
        self, b: Builder, node: ast.expr, names: Mapping[str, str], sizes: Mapping[str, int]
    ) -> str:
        if isinstance(node, ast.Name):
            return names[node.id]
        renamed = _Rename(names, sizes).visit(ast.parse(ast.unparse(node), mode="eval"))
        return b.add(ast.unparse(renamed))


@dataclass(frozen=True)
class Planted:
    """Where a pattern stands in a program: the values it returns, and those between."""

    results: tuple[str, ...]
    inner: tuple[str, ...]


class _Rename(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        self.names, self.sizes = names, sizes

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.sizes:
            return ast.Constant(self.sizes[node.id])
        return ast.Name(self.names.get(node.id, node.id))


def _parameter(name: str, annotation: str, sizes: Mapping[str, int]) -> Parameter:
    found = re.fullmatch(r"(?:(weight|input) )?(\w+)\[(.*)\](?: < (\w+))?", annotation)
    assert found, annotation
    kind, dtype, dims, below = found.groups()
    shape: list[int | str] = []
    for text in [d.strip() for d in dims.split(",")]:
        shape.append("T" if text == "T" else int(sizes.get(text, 0) or text))
    top = int(sizes.get(below, 0) or below) if below else 2
    scale = 1.0
    if kind == "weight":
        scale = float(shape[-1]) ** -0.5 if len(shape) > 1 else 0.5
    return Parameter(name, tuple(shape), dtype, kind or "activation", top, scale)


def draw_sizes(rng: random.Random) -> dict[str, int]:
    """Return the sizes that patterns name: odd ones, small ones and whole vectors."""
    width = rng.choice([8, 16, 16, 20, 32])
    groups = rng.choice([1, 2, 2, 3])
    heads = groups * rng.choice([1, 1, 2, 3])
    hidden = rng.choice([16, 24, 32, 33, 48, 64, 70])
    features = rng.choice([16, 17, 32, 48, 64])
    return {
        "D": hidden, "D2": 2 * hidden, "N": features, "N2": 2 * features,
        "E": width, "E2": width // 2, "H": heads, "G": groups,
        "HE": heads * width, "GE": groups * width, "K": rng.choice([2, 3, 4]),
        "M": rng.choice([64, 80, 96]), "Q": rng.choice([32, 64, 96]),
        "V": rng.choice([40, 61]), "W": rng.choice([3, 9, 17]),
    }  # fmt: skip
