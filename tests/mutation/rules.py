"""What each operator makes of one expression or statement."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult,
}  # fmt: skip


def variants(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Yield (operator, expression) of the mutants of one expression, not of its parts."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1 :]]
            yield "comparison", ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BinOp):
        if type(node.op) in ARITHMETIC and not _joins_texts(node):
            yield "arithmetic", ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and/or", ast.BoolOp(other, node.values)
        for i in range(len(node.values)):
            rest = [*node.values[:i], *node.values[i + 1 :]]
            yield "drop operand", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, ast.Not):
            yield "remove not", node.operand
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            yield "arithmetic", node.operand
    elif isinstance(node, ast.IfExp):
        yield "negate condition", ast.IfExp(negated(node.test), node.body, node.orelse)
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
        yield from _unfiltered(node)


def _unfiltered(node: Any) -> Iterator[tuple[str, ast.expr]]:
    """Yield the comprehension without each of its conditions."""
    for i, loop in enumerate(node.generators):
        if loop.ifs:
            bare = ast.comprehension(loop.target, loop.iter, [], loop.is_async)
            loops = [*node.generators[:i], bare, *node.generators[i + 1 :]]
            fields = {name: getattr(node, name) for name in node._fields if name != "generators"}
            yield "drop filter", type(node)(**fields, generators=loops)


def negated(test: ast.expr) -> ast.expr:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return test.operand
    return ast.UnaryOp(ast.Not(), test)


def alike(first: ast.expr, second: ast.expr) -> bool:
    """Return whether two arguments may be of one type; a TypeError would be no mistake to find."""
    if isinstance(first, ast.Constant) and isinstance(second, ast.Constant):
        return type(first.value) is type(second.value)
    plain = (ast.Name, ast.Attribute, ast.Subscript)
    return isinstance(first, plain) and isinstance(second, plain)


def _joins_texts(node: ast.BinOp) -> bool:
    """Return whether + joins texts, lists or tuples: the mutant would only raise TypeError."""
    kinds = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp)
    sides = (node.left, node.right)
    return any(
        isinstance(s, kinds) or (isinstance(s, ast.Constant) and isinstance(s.value, str))
        for s in sides
    )


def can_be_dropped(node: ast.stmt) -> bool:
    """Return whether a program without the statement still has all its names."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return all(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets)
    return isinstance(node, ast.AugAssign | ast.Continue | ast.Break | ast.Delete)


def default_of(annotation: str) -> ast.expr | None:
    """Return a default result of a type; None where there is no value to give back."""
    if "None" in annotation:
        return ast.Constant(None)
    empty: dict[str, ast.expr] = {
        "int": ast.Constant(0), "float": ast.Constant(0.0), "bool": ast.Constant(False),
        "str": ast.Constant(""), "list": ast.List([], ast.Load()),
        "tuple": ast.Tuple([], ast.Load()), "dict": ast.Dict([], []),
    }  # fmt: skip
    return empty.get(annotation.split("[")[0])
