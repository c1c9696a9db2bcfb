"""Which nodes of a kernel's body each line of its Triton text computes, found out from the text.

The text is followed as a compiler would: each value knows the operands that it was computed from,
through assignments, loops, calls of the module's functions and what is stored and loaded again. A
line belongs to the first node of the body that knows all of them too (behind a write, that node
knows the written cache). What several nodes compute from the same operands (a product and the
activation behind it) cannot be told apart so: inside a loop it is the first of them, outside it may
be any. An edited kernel is told just as well: no emitter is asked.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, fx

from aios_compile.ir import provenance
from aios_compile.ir.module import outputs, placeholders
from aios_compile.ir.printer import expression
from aios_compile.passes.fusion_groups import is_view

Operands = frozenset[int]
NOTHING: Operands = frozenset()
SIZES = ["T", "S", "R", "P"]  # follow the operands of a kernel (codegen/triton/frame.py)
ROUNDS = 3  # of a loop: values that go round it settle in two
MAX_DEPTH = 12  # of calls


@dataclass(frozen=True)
class BodyNode:
    """A node of a kernel's body: name, call, its lines of the model ("file:line in f: code")."""

    name: str
    call: str
    model_lines: tuple[str, ...]

    @staticmethod
    def of(node: fx.Node) -> BodyNode:
        """Describe a node."""
        return BodyNode(node.name, expression(node, ""), tuple(provenance.source_lines(node)))

    def told(self) -> str:
        """Return the name and where in the model it comes from."""
        lines = dict.fromkeys(line.partition(" in ")[0] for line in self.model_lines)
        return f"{self.name} ({', '.join(lines)})" if lines else self.name


def nodes_of_lines(text: str, body: fx.GraphModule) -> dict[int, tuple[BodyNode, ...]]:
    """Return line number (from 1) -> nodes; lines that compute addresses alone are left out."""
    found: dict[int, dict[fx.Node, None]] = {}
    known = _known(body)
    for line, operands, looped in _Flow(text, body).lines:
        for node in _owners(known, operands, looped):
            found.setdefault(line, {})[node] = None
    order = {node: i for i, node in enumerate(body.graph.nodes)}
    return {
        line: tuple(BodyNode.of(node) for node in sorted(own, key=order.__getitem__))
        for line, own in sorted(found.items())
    }


def annotated(text: str, nodes: Mapping[int, Sequence[BodyNode]]) -> str:
    """Return the text with the nodes and their model lines as comments; lines stay where they are.

    A run of lines of the same nodes is marked where it begins.
    """
    marked, last = list[str](), tuple[BodyNode, ...]()
    for number, line in enumerate(text.split("\n"), 1):
        own = tuple(nodes.get(number, ()))
        if own and own != last:
            line += f"  # <- {'; '.join(node.told() for node in own)}"
        last = own or last
        marked.append(line)
    return "\n".join(marked)


def tensor_holders(body: fx.GraphModule) -> list[fx.Node]:
    """Return the placeholders that are operands of the kernel (sizes are not)."""
    return [n for n in placeholders(body.graph) if isinstance(n.meta["val"], Tensor)]


def _known(body: fx.GraphModule) -> dict[fx.Node, Operands]:
    """Return the operands that each computing node depends on, results that it makes included.

    Result i is operand i where it is written, and -1 - i where what was written is read.
    """
    holders = tensor_holders(body)
    known: dict[fx.Node, Operands] = {n: frozenset((i,)) for i, n in enumerate(holders)}
    results = [_maker(n) for n in outputs(body.graph)]
    for node in [n for n in body.graph.nodes if n.op == "call_function"]:
        above = [known.get(n, NOTHING) for n in node.all_input_nodes]
        above += [frozenset(-1 - i for i in k if i >= len(holders)) for k in above]
        made = [len(holders) + i for i, result in enumerate(results) if result is node]
        known[node] = frozenset(made).union(*above)
    return {n: k for n, k in known.items() if n.op == "call_function" and not _moves(n)}


def _moves(node: fx.Node) -> bool:
    """Return whether a node computes nothing: a view, or one of several results."""
    return node.target is operator.getitem or is_view(node)


def _maker(node: fx.Node) -> fx.Node:
    """Return the node that computes what views and getitems hand on."""
    while node.op == "call_function" and _moves(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _owners(known: Mapping[fx.Node, Operands], wanted: Operands, looped: bool) -> list[fx.Node]:
    """Return the first node that knows the operands, and behind a loop those that add none."""
    first = next((n for n, operands in known.items() if wanted and wanted <= operands), None)
    if first is None or looped:
        return [] if first is None else [first]
    holders = (n for n in placeholders(first.graph) if isinstance(n.meta["val"], Tensor))
    count, chain = len(list(holders)), {first: None}
    for node, operands in known.items():
        grown = any(_maker(n) in chain for n in node.all_input_nodes)
        if grown and all(i >= count for i in operands - known[first]):
            chain[node] = None
    ends = [n for n in chain if any(i >= count and i in wanted for i in known[n] - known[first])]
    return ends or list(chain)


class Value(NamedTuple):
    """What a value is made of: the operands that it points into, those that it is computed from."""

    places: Operands = NOTHING
    data: Operands = NOTHING

    def __or__(self, other: Value) -> Value:
        return Value(self.places | other.places, self.data | other.data)


UNKNOWN = Value()
Environment = dict[str, Value]


class _Flow:
    """The values of all kernels of a module. `lines`: (line, operands, inside a loop)."""

    def __init__(self, text: str, body: fx.GraphModule) -> None:
        self.lines: set[tuple[int, Operands, bool]] = set()
        found = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
        self.functions = {n.name: n for n in found if n.decorator_list}  # `launch` is no kernel
        self.inputs = len(tensor_holders(body))
        self.count = self.inputs + len(outputs(body.graph))
        self.held: dict[int, Operands] = {}  # workspace -> what was stored there
        self.loops, self.depth = 0, 0
        for function in list(self.functions.values()) * 2:  # twice: a later kernel may store
            names = [a.arg for a in function.args.args]
            if [n for n in names if n in SIZES] == SIZES:
                operands = names[: names.index(SIZES[0])]
                self._body(
                    function.body, {n: Value(frozenset((i,))) for i, n in enumerate(operands)}
                )

    def _value(self, node: ast.AST, env: Environment) -> Value:
        """Return what an expression is made of."""
        if isinstance(node, ast.Name):
            return env.get(node.id, UNKNOWN)
        if isinstance(node, ast.Call):
            return self._call(node, env)
        found = UNKNOWN
        for part in ast.iter_child_nodes(node):
            found |= self._value(part, env)
        return found

    def _call(self, node: ast.Call, env: Environment) -> Value:
        """Follow a call: of a function of the module, a load, a store, or an operation.

        Where an element lies, and whether it is there (masks, conditions), is no part of its value.
        """
        given = [self._value(a, env) for a in node.args]
        named = {k.arg: self._value(k.value, env) for k in node.keywords}
        if isinstance(node.func, ast.Name):
            function = self.functions.get(node.func.id)
            if function is not None and self.depth < MAX_DEPTH:
                return self._called(function, given)
        operation = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if operation == "load":
            return Value(NOTHING, self._read(given[0].places) | named.get("other", UNKNOWN).data)
        if operation in ("store", "atomic_add"):
            for index in (i for i in given[0].places if i >= self.count):
                self.held[index] = self.held.get(index, NOTHING) | given[1].data
            return Value(given[0].places, given[1].data)
        if operation == "where":
            given = given[1:]
        found = (
            self._value(node.func.value, env) if isinstance(node.func, ast.Attribute) else UNKNOWN
        )
        for value in (*given, *named.values()):
            found |= value
        return found

    def _read(self, places: Operands) -> Operands:
        """Return what is found at some places: an operand, or what a workspace holds."""
        inside = (self.held.get(i, NOTHING) for i in places if i >= self.count)
        read = (-1 - i if i >= self.inputs else i for i in places if i < self.count)
        return frozenset(read).union(*inside)

    def _called(self, function: ast.FunctionDef, given: Sequence[Value]) -> Value:
        self.depth += 1
        result = self._body(function.body, dict(zip((a.arg for a in function.args.args), given)))
        self.depth -= 1
        return result

    def _body(self, statements: Sequence[ast.stmt], env: Environment) -> Value:
        """Follow statements; return what they return."""
        result = UNKNOWN
        for statement in statements:
            result |= self._statement(statement, env)
        return result

    def _statement(self, statement: ast.stmt, env: Environment) -> Value:
        if isinstance(statement, ast.For | ast.While):
            self.loops += 1
            for _ in range(ROUNDS):
                before = dict(env)
                result = self._body(statement.body, env)
                env.update({name: env[name] | value for name, value in before.items()})
            self.loops -= 1
            return result
        if isinstance(statement, ast.If):
            other = dict(env)
            result = self._body(statement.body, env) | self._body(statement.orelse, other)
            env.update({name: env.get(name, UNKNOWN) | value for name, value in other.items()})
            return result
        if not isinstance(statement, ast.Assign | ast.AugAssign | ast.Return | ast.Expr):
            return UNKNOWN
        value = self._value(statement.value, env) if statement.value else UNKNOWN
        targets: list[ast.expr] = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AugAssign):
            value |= self._value(statement.target, env)
            targets = [statement.target]
        names = (n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        env.update({name.id: value for name in names})
        self._note(statement, value)
        return value if isinstance(statement, ast.Return) else UNKNOWN

    def _note(self, statement: ast.stmt, value: Value) -> None:
        """Note the operands of a statement's lines; a workspace stands for what it holds."""
        places = (self.held.get(i, NOTHING) if i >= self.count else {i} for i in value.places)
        operands = value.data.union(*places)
        last = statement.end_lineno or statement.lineno
        for line in range(statement.lineno, last + 1):
            self.lines.add((line, operands, bool(self.loops)))
