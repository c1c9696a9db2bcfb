"""Take a generated kernel module apart: definitions, operand types, the launches of each variant.

The inverse of frame.module_text, by Python's own parser; nothing is run or imported.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from aios_compile.codegen.source import KernelSource
from aios_compile.errors import CodegenError

FRAME = ("TYPES", "WORKSPACE", "VARIANTS", "launch", "INTERPRETED", "DEPENDENT")


@dataclass(frozen=True)
class PartLaunch:
    """One launch of a variant. grid: texts of one or two extents over T, S, R, P."""

    kernel: str
    grid: tuple[str, ...]
    constexprs: dict[str, str]
    options: dict[str, int]


@dataclass(frozen=True)
class ModuleParts:
    """A module's text in parts. definitions: name -> text of a function or a constant, in order.

    arguments: a kernel's parameters up to T, S, R, P. rows: the text of the rows that pick a
    variant; variants: (most rows or None, launches).
    """

    source: KernelSource
    types: tuple[str, ...]
    rows: str
    definitions: dict[str, str]
    variants: tuple[tuple[int | None, tuple[PartLaunch, ...]], ...]
    uses: dict[str, set[str]] = field(default_factory=dict)

    def variant(self, rows: int | None) -> tuple[PartLaunch, ...]:
        """Return the launches that serve so many rows (None: any number)."""
        found = (v for most, v in self.variants if most is None or (rows and rows <= most))
        return next(found)

    def reached(self, kernel: str) -> set[str]:
        """Return the names of all definitions that a kernel uses, itself included."""
        found, todo = set[str](), [kernel]
        while todo:
            name = todo.pop()
            if name in self.definitions and name not in found:
                found.add(name)
                todo += self.uses[name]
        return found


def take_apart(source: KernelSource) -> ModuleParts:
    """Return the parts of a module that frame.module_text made."""
    tree, lines = ast.parse(source.text), source.text.split("\n")
    definitions: dict[str, str] = {}
    uses: dict[str, set[str]] = {}
    frame: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name, first = node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, first = node.targets[0].id, node.lineno
        else:
            continue
        if name in FRAME:
            frame[name] = node
            continue
        assert node.end_lineno is not None
        definitions[name] = "\n".join(lines[first - 1 : node.end_lineno])
        uses[name] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    types, variants = _value(frame["TYPES"]), _value(frame["VARIANTS"])
    assert isinstance(types, ast.Tuple) and isinstance(variants, ast.Tuple)
    return ModuleParts(
        source, tuple(ast.literal_eval(types)), _rows(frame["launch"]), definitions,
        tuple(_variant(node) for node in variants.elts), uses,
    )  # fmt: skip


def _value(node: ast.stmt) -> ast.expr:
    assert isinstance(node, ast.Assign)
    return node.value


def _rows(launch: ast.stmt) -> str:
    """Return the text that `launch` compares with a variant's bound."""
    test = next(n for n in ast.walk(launch) if isinstance(n, ast.BoolOp)).values[1]
    assert isinstance(test, ast.Compare)
    return ast.unparse(test.left)


def _keywords(node: ast.expr) -> dict[str, ast.expr]:
    assert isinstance(node, ast.Call)
    return {k.arg: k.value for k in node.keywords if k.arg is not None}


def _variant(node: ast.expr) -> tuple[int | None, tuple[PartLaunch, ...]]:
    given = _keywords(node)
    launches = given["launches"]
    assert isinstance(launches, ast.Tuple)
    return ast.literal_eval(given["most"]), tuple(_launch(x) for x in launches.elts)


def _launch(node: ast.expr) -> PartLaunch:
    given = _keywords(node)
    grid = given["grid"]
    assert isinstance(grid, ast.Lambda) and isinstance(grid.body, ast.Tuple)
    return PartLaunch(
        ast.unparse(given["kernel"]), tuple(ast.unparse(x) for x in grid.body.elts),
        {k: ast.unparse(v) for k, v in _keywords(given["constexprs"]).items()},
        {k: ast.literal_eval(v) for k, v in _keywords(given["options"]).items()},
    )  # fmt: skip


def merged_definitions(parts: list[ModuleParts], wanted: list[set[str]]) -> dict[str, str]:
    """Return the wanted definitions of several modules in one namespace, in their order.

    Raises CodegenError where two modules define one name differently.
    """
    found: dict[str, str] = {}
    for part, names in zip(parts, wanted):
        for name, text in part.definitions.items():
            if name not in names:
                continue
            if found.setdefault(name, text) != text:
                raise CodegenError(
                    f"{part.source.symbol} defines {name} otherwise than a kernel before it",
                    advice="load with persistent_decode=False",
                )
    return found
