"""Evaluate the Python of a docstring example, without exec: names, calls, tuples, returns."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any


class ExampleFunction:
    """A function of an example: call it with values; `parameters` are its annotations by name."""

    def __init__(self, node: ast.FunctionDef, scope: Mapping[str, Any]) -> None:
        self.node, self.scope = node, dict(scope)
        self.__name__ = node.name
        self.parameters = {
            a.arg: str(a.annotation.value) if isinstance(a.annotation, ast.Constant) else ""
            for a in node.args.args
        }

    def __call__(self, *values: Any) -> Any:
        assert len(values) == len(self.parameters), f"{self.__name__}: wrong number of arguments"
        scope = {**self.scope, **dict(zip(self.parameters, values))}
        for statement in self.node.body:
            if isinstance(statement, ast.Return):
                assert statement.value is not None
                return _value(statement.value, scope)
            _execute(statement, scope)
        raise AssertionError(f"{self.__name__} returns nothing")


def read(source: str, scope: Mapping[str, Any]) -> ExampleFunction:
    """Return the one function that a block defines; `scope` is what it may name."""
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef), "a block is one function"
    return ExampleFunction(node, scope)


def _execute(statement: ast.stmt, scope: dict[str, Any]) -> None:
    if isinstance(statement, ast.FunctionDef):
        function: Any = ExampleFunction(statement, scope)
        for decorator in reversed(statement.decorator_list):
            function = _value(decorator, scope)(function)
        scope[statement.name] = function
        return
    assert isinstance(statement, ast.Assign), f"unexpected statement {ast.unparse(statement)}"
    (target,) = statement.targets
    _assign(target, _value(statement.value, scope), scope)


def _assign(target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
    if isinstance(target, ast.Name):
        scope[target.id] = value
        return
    assert isinstance(target, ast.Tuple), f"cannot assign to {ast.unparse(target)}"
    for i, part in enumerate(target.elts):
        _assign(part, value[i], scope)


def _value(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return scope[name]
        case ast.Attribute(value=owner, attr=name):
            return getattr(_value(owner, scope), name)
        case ast.Tuple(elts=parts):
            return tuple(_values(parts, scope))
        case ast.List(elts=parts):
            return _values(parts, scope)
        case ast.Subscript(value=owner, slice=index):
            return _value(owner, scope)[_value(index, scope)]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, scope)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            named = {str(k.arg): _value(k.value, scope) for k in keywords}
            return _value(function, scope)(*_values(arguments, scope), **named)
    raise AssertionError(f"unexpected expression {ast.unparse(node)}")


def _values(nodes: Sequence[ast.expr], scope: Mapping[str, Any]) -> list[Any]:
    return [_value(node, scope) for node in nodes]


def evaluate(expression: str, scope: Mapping[str, Any]) -> Any:
    """Evaluate one expression over the names of `scope`."""
    return _value(ast.parse(expression, mode="eval").body, scope)
