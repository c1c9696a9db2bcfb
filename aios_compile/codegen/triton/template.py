"""Assemble one Triton module from text templates: constants, template files, one kernel a launch.

Templates are Triton functions in templates/; what varies is defined before them as constants
(`tl.constexpr`, folded by the compiler), so that a module reads from top to bottom without holes. A
kernel takes every operand and hands those that matter to a function of a template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from aios_compile.codegen.naming import variable
from aios_compile.codegen.operand import Dim, Operand, SizeExpr
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.frame import Launch, Variant, module_text
from aios_compile.codegen.triton.frame import signature as head_of
from aios_compile.codegen.triton.launch_forms import Forms, candidates
from aios_compile.errors import CodegenError

TEMPLATES = Path(__file__).parent / "templates"


class Text(str):
    """A constant that is written as it is."""

    def __repr__(self) -> str:
        return str(self)


Spec = TypeVar("Spec")


@dataclass(frozen=True)
class Bound(Generic[Spec]):
    """A spec of the C++ target with all operands: a Triton kernel's signature has their dtypes."""

    spec: Spec
    operands: tuple[Operand, ...]


Values = Mapping[str, int | float | bool | Text]


@dataclass(frozen=True)
class Entry:
    """A kernel: the template's function that it calls, with which operands, sizes and constexprs.

    arguments: operand indices, or texts over T, S, R, P. grid: text over T, S, R, P.
    """

    function: str
    arguments: tuple[int | str, ...]
    grid: str
    constexprs: tuple[tuple[str, int | str], ...] = ()
    num_warps: int = 4
    num_stages: int = 3


def symbol_of(name: str, spec: object) -> str:
    """Return the name of a module: what it computes and ten hex digits of the spec."""
    return f"aios_{name}_{hashlib.sha256(repr(spec).encode()).hexdigest()[:10]}"


def fixed(dim: Dim) -> int:
    """Return a dimension that a template bakes in. Raises CodegenError for one that varies."""
    if isinstance(dim, SizeExpr):
        raise CodegenError(f"the Triton templates have no size {dim.text('')} in an address")
    return dim


def is_fixed(*dims: Dim) -> bool:
    """Return whether all dimensions are numbers."""
    return all(isinstance(d, int) for d in dims)


def next_power_of_two(size: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())


def kernel(
    name: str,
    spec: object,
    summary: Sequence[str],
    operands: Sequence[Operand],
    values: Values,
    templates: Sequence[str | Text],
    variants: Sequence[tuple[int | None, Sequence[Entry]]],
    rows: Dim,
    *,
    inplace: tuple[tuple[int, int], ...] = (),
    lines: Sequence[str] = (),
    workspace: Sequence[Operand] = (),
    counters: int = 0,
    others: Mapping[int | None, Forms[Sequence[Entry]]] | None = None,
    signature: str = "",
) -> KernelSource:
    """Return the source of one module.

    values: constants by name. templates: files below templates/, or the Text itself. variants: the
    entries that run for up to so many `rows` (None: any number). counters: how many the module
    needs; they are the last operand. others: row bound -> what else the clock may choose, under
    the signature.
    """
    others = others or {}
    symbol = symbol_of(name, spec)
    told = [*summary, *(["computes", *(f"  {x}" for x in lines)] if lines else [])]
    spaces = [*workspace, *([Operand("counters", "i32", (counters,), (1,))] if counters else [])]
    every = [*operands, *spaces]
    parts = ["\n".join(f"{k} = tl.constexpr({v!r})" for k, v in values.items())]
    for file in ("prelude", *templates):
        known = isinstance(file, Text)
        parts.append(file if known else (TEMPLATES / f"{file}.py.txt").read_text().rstrip("\n"))
    chosen = []
    for most, entries in variants:
        forms = others.get(most, Forms(entries, "", {}))
        for entry in (*entries, *(e for form in forms.others.values() for e in form)):
            text = _entry(symbol, entry, every)
            if text not in parts:
                parts.append(text)
        listed = [(n, tuple(_launch(symbol, e) for e in es)) for n, es in forms.others.items()]
        launches = tuple(_launch(symbol, entry) for entry in entries)
        chosen.append(Variant(most, launches, tuple(listed), forms.name))
    text = module_text(told, every, parts, chosen, rows, workspace)
    return KernelSource(
        name, symbol, "triton", text, len(operands), inplace, tuple(lines), tuple(workspace),
        counters, candidates=candidates(list(others.values()), signature),
    )  # fmt: skip


def _entry(symbol: str, entry: Entry, operands: Sequence[Operand]) -> str:
    names = [name for name, _ in entry.constexprs]
    given = [variable(operands[a], a) if isinstance(a, int) else a for a in entry.arguments]
    head = head_of(f"{symbol}_{entry.function}", operands, names)
    return "\n".join([*head, f"    {entry.function}({', '.join([*given, *names])})"])


def _launch(symbol: str, entry: Entry) -> Launch:
    return Launch(
        f"{symbol}_{entry.function}", entry.grid, entry.constexprs, entry.num_warps,
        entry.num_stages,
    )  # fmt: skip
