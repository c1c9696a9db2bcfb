"""Mutants of a Python file: one small mistake each, made in its syntax tree.

The operators are the usual ones (Offutt et al., "An experimental determination of sufficient mutant
operators", 1996): relations, arithmetic, logic, constants, statements; to them come swapped
arguments and default results. What cannot change a result is left out by rule: see `_Finder.skips`.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.mutation import rules, text_operators

# Calls whose text nobody computes with: messages, logs, refusals' reasons, comments of kernels.
MESSAGES = frozenset(
    (
        "log",
        "refuse",
        "Refusal",
        "warn",
        "warning",
        "info",
        "debug",
        "print",
        "model_line",
        "model_lines",
    )
)
# Hints: they change how fast, never what.
HINTS = frozenset(
    ("num_warps", "num_stages", "jobs", "reason", "advice", "lines", "summary", "line")
)
# Calls that give the same for swapped arguments, or nothing but a TypeError.
COMMUTE = frozenset(
    (
        "min",
        "max",
        "gcd",
        "lcm",
        "multiply",
        "product",
        "add",
        "union",
        "intersection",
        "isinstance",
        "issubclass",
    )
)
# Functions that only describe.
DESCRIBE = frozenset(("__repr__", "__str__", "_comment", "describe", "explain"))


@dataclass(frozen=True)
class Mutant:
    """One mistake. `number` is its place among the file's mutants; `line` its statement's line.

    `function` is the qualified name around it, "" at the top of the module.
    """

    file: str
    number: int
    operator: str
    line: int
    function: str
    before: str
    after: str
    key: str = ""  # a name that stays when other parts of the file change


@dataclass
class _Edit:
    """A found mutation: `apply` makes it in the tree that was searched."""

    operator: str
    line: int
    function: str
    before: str
    after: str
    apply: Callable[[], None]


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Return all mutants of a Python file, or of a template, in the order of its text."""
    if file.endswith(".py"):
        found = [
            (e.operator, e.line, e.function, e.before, e.after)
            for e in _find(ast.parse(source), file)
        ]
    else:
        texts = text_operators.mutations(source)
        found = [(m.operator, m.line + 1, "", m.before, m.after) for m in texts]
    seen: Counter[str] = Counter()
    result = []
    for i, (operator, line, function, before, after) in enumerate(found):
        name = "|".join((file, function, operator, before, after))
        key = hashlib.sha256(f"{name}|{seen[name]}".encode()).hexdigest()[:12]
        seen[name] += 1
        result.append(Mutant(file, i, operator, line, function, before, after, key))
    return result


def mutated_text(source: str, number: int) -> str:
    """Return a template with mutant `number` in it."""
    return list(text_operators.mutations(source))[number].text


def mutated_tree(file: str, source: str, number: int) -> ast.Module:
    """Return the file's tree with mutant `number` in it; positions stay those of the file."""
    tree = ast.parse(source)
    _find(tree, file)[number].apply()
    return ast.fix_missing_locations(tree)


def _find(tree: ast.Module, file: str) -> list[_Edit]:
    finder = _Finder(text="codegen/cpp/" in file or "codegen/triton/" in file)
    finder.block(tree.body, tree)
    return sorted(finder.edits, key=lambda e: e.line)  # stable: within a line as found


class _Finder:
    """Walks statements and expressions and notes what can be mutated."""

    def __init__(self, text: bool) -> None:
        self.edits: list[_Edit] = []
        self.names: list[str] = []
        self.line = 0
        self.text = text
        self.returns: ast.expr | None = None

    def note(self, operator: str, before: Any, after: Any, apply: Callable[[], None]) -> None:
        texts = [x if isinstance(x, str) else ast.unparse(x) for x in (before, after)]
        self.edits.append(_Edit(operator, self.line, ".".join(self.names), *texts, apply))

    def replace(self, operator: str, owner: Any, place: Any, new: ast.AST) -> None:
        """Note that owner.place (a field, or an index of a list) can be `new`."""
        is_list = isinstance(owner, list)
        old = owner[place] if is_list else getattr(owner, place)
        self.note(operator, old, new, _setter(owner, place, new, old))

    # Statements

    def block(self, body: list[ast.stmt], owner: ast.AST) -> None:
        for i, statement in enumerate(body):
            documented = isinstance(owner, ast.Module | ast.ClassDef | ast.FunctionDef)
            if i == 0 and documented and is_text(statement):
                continue
            self.line = statement.lineno
            self.statement(statement, body, i)

    def statement(self, node: ast.stmt, body: list[ast.stmt], i: int) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self.definition(node)
            return
        if self.skips(node):
            return
        if self.names and rules.can_be_dropped(node):
            self.replace("drop statement", body, i, ast.Pass())
        if isinstance(node, ast.If | ast.While):
            self.replace("negate condition", node, "test", rules.negated(node.test))
        if isinstance(node, ast.Return) and node.value is not None:
            self.default_result(node)
        line = self.line
        for field, value in ast.iter_fields(node):
            if field in ("body", "orelse", "finalbody"):
                self.block(value, node)
            elif field == "handlers":
                for handler in value:
                    self.block(handler.body, handler)
            elif field == "cases":
                for case in value:
                    self.block(case.body, case)
            elif field not in ("annotation", "type_comment"):
                self.line = line
                self.field(node, field, value)

    def definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        if node.name in DESCRIBE:
            return
        outer = self.returns
        if not isinstance(node, ast.ClassDef):
            for i, default in enumerate(node.args.defaults):
                self.expression(default, node.args.defaults, i)
            self.returns = node.returns
        self.names.append(node.name)
        self.block(node.body, node)
        self.names.pop()
        self.returns = outer

    def skips(self, node: ast.stmt) -> bool:
        """Return whether mutants of a statement would be equivalent, or only change messages."""
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.Global):
            return True  # invariants and messages: no program that is right depends on them
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return _called(node.value) in MESSAGES
        if isinstance(node, ast.Expr) and is_text(node):
            return True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return True
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = {t.id for t in targets if isinstance(t, ast.Name)}
        typed = isinstance(node, ast.Assign) and _called(node.value) in ("TypeVar", "getLogger")
        return typed or bool(names & {"__all__", "__slots__", *HINTS})

    def default_result(self, node: ast.Return) -> None:
        value = node.value
        assert value is not None
        new = rules.default_of(ast.unparse(self.returns) if self.returns else "")
        if new is not None and ast.unparse(new) != ast.unparse(value):
            self.replace("default result", node, "value", new)

    # Expressions

    def field(self, owner: ast.AST, name: str, value: Any) -> None:
        if isinstance(value, ast.expr):
            self.expression(value, owner, name)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, ast.expr):
                    self.expression(item, value, i)
                elif isinstance(item, ast.AST) and not isinstance(item, ast.stmt):
                    self.children(item)
        elif isinstance(value, ast.AST) and not isinstance(value, ast.stmt):
            self.children(value)

    def children(self, node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            self.field(node, name, value)

    def expression(self, node: ast.expr, owner: Any, place: Any) -> None:
        if isinstance(node, ast.Constant):
            self.constant(node, owner, place)
            return
        if isinstance(node, ast.Call):
            self.call(node, owner, place)
            return
        for operator, new in rules.variants(node):
            self.replace(operator, owner, place, new)
        if isinstance(node, ast.comprehension):
            return
        if isinstance(node, ast.JoinedStr):
            for i, part in enumerate(node.values):
                if isinstance(part, ast.Constant) and self.text:
                    self.constant(part, node.values, i)
                elif isinstance(part, ast.FormattedValue) and self.text:
                    self.expression(part.value, part, "value")
            return
        for name, value in ast.iter_fields(node):
            if isinstance(node, ast.Subscript | ast.Call) and name == "annotation":
                continue
            self.field(node, name, value)

    def call(self, node: ast.Call, owner: Any, place: Any) -> None:
        called = _called(node)
        if called in MESSAGES or called.endswith("Error"):
            return
        for i in range(len(node.args) - 1 if called not in COMMUTE else 0):
            first, second = node.args[i : i + 2]
            if rules.alike(first, second) and ast.unparse(first) != ast.unparse(second):
                args = [*node.args[:i], second, first, *node.args[i + 2 :]]
                self.replace("swap arguments", owner, place, _call(node, args))
        self.expression(node.func, node, "func")
        for i, argument in enumerate(node.args):
            self.expression(argument, node.args, i)
        for keyword in node.keywords:
            if keyword.arg not in HINTS:
                self.expression(keyword.value, keyword, "value")

    def constant(self, node: ast.Constant, owner: Any, place: Any) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace("constant", owner, place, ast.Constant(not value))
        elif isinstance(value, int):
            self.replace("constant", owner, place, ast.Constant(value + 1))
            if value > 1:
                self.replace("constant", owner, place, ast.Constant(value - 1))
        elif isinstance(value, float):
            self.replace("constant", owner, place, ast.Constant(value * 2 + 1))
        elif isinstance(value, str) and self.text:
            for found in text_operators.mutations(value):
                apply = _setter(owner, place, ast.Constant(found.text), node)
                self.note(found.operator, found.before or value, found.after, apply)


def _setter(owner: Any, place: Any, new: ast.AST, old: ast.AST) -> Callable[[], None]:
    def apply() -> None:
        ast.copy_location(new, old)
        if isinstance(owner, list):
            owner[place] = new
        else:
            setattr(owner, place, new)

    return apply


def _call(node: ast.Call, args: list[ast.expr]) -> ast.Call:
    return ast.Call(node.func, args, node.keywords)


def _called(node: ast.expr) -> str:
    """Return the last name of what is called: "refuse" of context.refuse(...)."""
    function = node.func if isinstance(node, ast.Call) else node
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def is_text(node: ast.stmt) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)  # type: ignore[attr-defined]
