"""Make a failing example small, and write it down as a script that runs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from aios_compile.study.fuzz.builder import NAMES
from aios_compile.study.fuzz.example import Example, Setup
from aios_compile.study.fuzz.program import Parameter, Program, Rejected, names_in, run_expression

MAX_TRIALS = 150
Fails = Callable[[Example], bool]
SAMPLE = 3  # tokens at which shapes are looked at


def shrink(example: Example, fails: Fails, max_trials: int = MAX_TRIALS) -> Example:
    """Return a smaller example that still fails: fewer settings, results and statements.

    Greedy: a change is kept when the example fails with it, and the search starts again; it ends
    after `max_trials` examples, or when nothing can be left out. `fails` compiles and runs.
    """
    trials, seen = 0, {example}
    again = True
    while again and trials < max_trials:
        again = False
        for candidate in candidates(example):
            if candidate in seen:
                continue
            seen.add(candidate)
            trials += 1
            if fails(candidate):
                example, again = candidate, True
                break
            if trials >= max_trials:
                break
    return example


def candidates(example: Example) -> Iterator[Example]:
    """Yield smaller examples, the largest steps first."""
    for setup in _setups(example.setup):
        yield replace(example, setup=setup)
    for program in _programs(example.program, keep_first=example.setup.steps):
        yield replace(example, program=program)


def _setups(setup: Setup) -> Iterator[Setup]:
    plain = Setup(
        setup.seed, setup.tokens, setup.steps, setup.gathered, setup.sampled,
        stored=setup.stored, quantization=setup.quantization, rounded=setup.rounded,
        kv=setup.kv, target=setup.target,
    )  # fmt: skip
    if plain != setup:
        yield plain
        yield replace(setup, region=None)
        yield replace(setup, order=0)
        yield replace(setup, disabled=())
    for i in range(len(setup.disabled)):
        yield replace(setup, disabled=setup.disabled[:i] + setup.disabled[i + 1 :])
    if len(setup.tokens) > 1:
        yield from (replace(setup, tokens=(t,)) for t in setup.tokens)
    if setup.sampled:
        yield replace(setup, sampled=False)
    elif setup.gathered:
        yield replace(setup, gathered=False)


def _programs(program: Program, keep_first: bool) -> Iterator[Program]:
    results = program.results
    if len(results) > 1:
        for i in range(int(keep_first), len(results)):
            yield replace(program, results=results[:i] + results[i + 1 :]).without_dead()
        if not keep_first:
            yield from (replace(program, results=(r,)).without_dead() for r in results)
    for statement in reversed(program.statements):
        if not keep_first:
            for name in sorted(names_in(statement.expression)):
                if statement.name in results and name not in results:
                    swapped = tuple(name if r == statement.name else r for r in results)
                    yield replace(program, results=swapped).without_dead()
        yield from _without(program, statement.name)


def _without(program: Program, name: str) -> Iterator[Program]:
    """Yield programs in which a statement is an operand of its shape, or a parameter."""
    values = _values(program)
    value = values.get(name)
    if not isinstance(value, torch.Tensor):
        return
    statement = next(s for s in program.statements if s.name == name)
    for other in sorted(names_in(statement.expression)):
        operand = values[other]
        if isinstance(operand, torch.Tensor) and operand.shape == value.shape:
            yield _renamed(program, name, other)
    shape = tuple("T" if s == SAMPLE else s for s in value.shape)
    if value.dtype.is_floating_point and shape != tuple(value.shape):
        parameter = Parameter(f"p{name}", shape, NAMES[value.dtype])
        yield _renamed(
            replace(program, parameters=(*program.parameters, parameter)), name, parameter.name
        )


def _values(program: Program) -> dict[str, object]:
    values: dict[str, object] = dict(program.values(SAMPLE, 0))
    for statement in program.statements:
        try:
            values[statement.name] = run_expression(statement.expression, values)
        except Rejected:
            break
    return values


def _renamed(program: Program, name: str, other: str) -> Program:
    """Return the program without the statement `name`, whose users read `other`."""

    class Rename(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.Name:
            return ast.Name(other) if node.id == name else node

    kept = [
        replace(s, expression=ast.unparse(Rename().visit(ast.parse(s.expression, mode="eval"))))
        for s in program.statements
        if s.name != name
    ]
    results = tuple(dict.fromkeys(other if r == name else r for r in program.results))
    return replace(program, statements=tuple(kept), results=results).without_dead()


def write_script(example: Example, what: str, path: Path) -> Path:
    """Write a script that runs an example: it says what is wrong and exits with 1, or with 0."""
    parameters = ",\n    ".join(map(repr, example.program.parameters))
    comment = "\n".join(f"# {line}" for line in what.splitlines())
    text = f'''"""Found by `aios fuzz`: {", ".join(example.planted) or "a random graph"}.

Run it in a checkout: PYTHONPATH=. python {path.name}
"""

{comment}
import sys

import torch
import torch.nn.functional as F

from aios_compile.study.fuzz.program import Parameter
from aios_compile.study.fuzz.example import Setup
from aios_compile.study.fuzz.script import main

aten, aios = torch.ops.aten, torch.ops.aios
PARAMETERS = (
    {parameters},
)
SETUP = {example.setup!r}


{example.program.text()}

if __name__ == "__main__":
    sys.exit(main(__file__, PARAMETERS, SETUP))
'''
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
