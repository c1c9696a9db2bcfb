"""What a script written by the fuzzer calls: read back its program, compile and compare it."""

from __future__ import annotations

import ast
import tempfile
from pathlib import Path

from aios_compile.study.fuzz.example import Example, FuzzFailure, Setup, run_example
from aios_compile.study.fuzz.program import Parameter, Program, Statement


def main(file: str, parameters: tuple[Parameter, ...], setup: Setup) -> int:
    """Run the function `program` of a script; print what is wrong. Return the exit code."""
    program = read_program(Path(file).read_text(encoding="utf-8"), parameters)
    with tempfile.TemporaryDirectory(prefix="aios-fuzz-") as objects:
        try:
            outcome = run_example(Example(program, setup), Path(objects))
        except FuzzFailure as failure:
            print(failure)
            return 1
    print(outcome.refused or f"right: the error is {outcome.worst:.0%} of what is allowed")
    return 0


def read_program(text: str, parameters: tuple[Parameter, ...]) -> Program:
    """Return the function `program` of a script, edited or not, as a Program."""
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    (function,) = [f for f in functions if f.name == "program"]
    statements, results = [], tuple[str, ...]()
    for node in function.body:
        if isinstance(node, ast.Return):
            assert isinstance(node.value, ast.Tuple)
            results = tuple(ast.unparse(e) for e in node.value.elts)
        else:
            assert isinstance(node, ast.Assign), f"unexpected statement {ast.unparse(node)}"
            statements.append(Statement(ast.unparse(node.targets[0]), ast.unparse(node.value)))
    return Program(parameters, tuple(statements), results)
