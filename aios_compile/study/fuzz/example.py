"""One example: a program and how it is compiled; run it, and say what is wrong with it."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from aios_compile.codegen.program import Program as Compiled
from aios_compile.errors import AiosError, CaptureError, CodegenError, UnsupportedModelError
from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule, placeholders
from aios_compile.ir.stored_weights import bind_stored_weights, random_rows, stored_name
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.measure import one_thread
from aios_compile.passes.pipeline import FUSE, RAISE, REWRITE
from aios_compile.passes.result import PassResult
from aios_compile.passes.runner import Stage
from aios_compile.study.fuzz import step_run
from aios_compile.study.fuzz.compile_graph import compile_graph, prepare
from aios_compile.study.fuzz.judge import (
    FACTOR,
    TWO_PARTS,
    Verdict,
    compare,
    run_eager,
    second_opinion,
)
from aios_compile.study.fuzz.outline import outline
from aios_compile.study.fuzz.program import Program
from aios_compile.study.fuzz.trace_function import trace

TARGETS = ("cpp", "triton")
REFUSALS = (CaptureError, CodegenError, UnsupportedModelError)


class FuzzFailure(AssertionError):
    """An example that is wrong, crashes, or of which a pass was reverted."""


@dataclass(frozen=True)
class Setup:
    """How a program is compiled and run.

    steps: through all stages and in batches over pages. sampled, gathered: with the passes of the
    last rows. tokens: the numbers of tokens to run it for (without steps). disabled: passes left
    out. order: a seed by which the optional passes of each stage change places, 0 for none.
    region: the part of the graph that becomes a region, as fractions. proven: with certificates.
    rounded: activations are rounded to bf16 where weights are. kv: the caches hold such codes
    ("int8").
    """

    seed: int = 0
    tokens: tuple[int, ...] = (1, 17)
    steps: bool = False
    gathered: bool = False
    sampled: bool = False
    disabled: tuple[str, ...] = ()
    order: int = 0
    region: tuple[float, float] | None = None
    proven: bool = False
    stored: str = ""
    quantization: str = ""
    rounded: bool = False
    kv: str = ""
    target: str = "cpp"

    @property
    def lossy(self) -> bool:
        """Return whether linears round what they multiply, or caches what they hold."""
        return bool(self.stored or self.quantization or self.rounded or self.kv)


@dataclass(frozen=True)
class Example:
    """A program, its setup, and what was planted in it (pass, pattern, context)."""

    program: Program
    setup: Setup
    planted: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of an example. worst: the largest error as a share of its budget.

    refused: the typed error of what is not supported. second: a second opinion was needed.
    """

    hits: dict[str, int] = field(default_factory=dict)
    worst: float = 0.0
    refused: str = ""
    second: bool = False


class Runnable(Protocol):
    """A compiled program."""

    module: IRModule
    program: Compiled
    results: list[PassResult]

    def __call__(self, sizes: Any, **inputs: Tensor) -> list[Tensor]: ...


Compile = Callable[..., Any]


def run_example(example: Example, objects: Path, compiler: Compile | None = None) -> Outcome:
    """Compile and run an example and compare it with eager. Raises FuzzFailure."""
    with one_thread():
        return _run(example, objects, compiler)


def _run(example: Example, objects: Path, compiler: Compile | None) -> Outcome:
    setup = example.setup
    try:
        level_1 = capture(example)
    except CaptureError as error:
        return Outcome(refused=f"CaptureError: {error.message}")
    make = compiler or _compiler_of(setup.target)
    stages = stages_of(setup)
    there = {
        info_of(p).name
        for stage in stages
        for p in stage.passes
        if info_of(p).runs_on(setup.target)
    }
    try:
        compiled = make(
            snapshot.take(level_1),
            {"T": step_run.MAX_TOKENS, "S": 4, "R": 8},
            stages,
            verify=int(setup.proven),
            objects=objects,
            options=options_of(setup),
            disabled=[name for name in setup.disabled if name in there],
        )
    except REFUSALS as error:
        return Outcome(refused=f"{type(error).__name__}: {error.message}")
    except AiosError as error:
        raise FuzzFailure(f"crash: {type(error).__name__}: {error}") from error
    outcome = Outcome({r.name: r.hits for r in compiled.results if r.kept})
    try:
        _check_kept(compiled.results, setup)
        if setup.steps:
            step_run.check(example, level_1, compiled, outcome)
        else:
            _check_tokens(example, level_1, compiled, outcome)
    finally:
        compiled.runner.close()
    return outcome


def _compiler_of(target: str) -> Compile:
    if target == "cpp":
        return compile_graph
    from aios_compile.study.fuzz.interpreted import interpret_graph

    return interpret_graph


def capture(example: Example) -> IRModule:
    """Return level 1 of an example: traced, its weights valued, part of it in a region."""
    setup, program = example.setup, example.program
    module = trace(program.function())
    prepare(module)
    for parameter in program.parameters:
        if parameter.kind == "weight":
            module.tensors[parameter.name] = parameter.value(1, setup.seed)
    if setup.region is not None:
        outline(module, *setup.region)
        prepare(module)
    if setup.stored:
        _store(module, setup)
    return module


def _store(module: IRModule, setup: Setup) -> None:
    """Let the matrices whose rows fit the format be stored in it."""
    from aios_compile.ir.quant_format import QuantFormat

    form = QuantFormat.parse(setup.stored)
    shapes = {
        n.name: tuple(map(int, n.meta["val"].shape))
        for n in placeholders(module.root.graph)
        if n.name in module.weights
    }
    fits = {n: s for n, s in shapes.items() if len(s) == 2 and s[1] % form.group == 0}
    bind_stored_weights(module, dict.fromkeys(fits, setup.stored))
    for name, (rows, depth) in fits.items():
        key = stored_name(name, setup.stored)
        shape = (rows, form.row_bytes(depth))
        module.tensors[key] = random_rows(key, shape, setup.seed)


def options_of(setup: Setup) -> PassOptions:
    """Return what the passes are told."""
    return PassOptions(
        target=setup.target,
        num_pages=16,
        quantization=setup.quantization,
        bf16_dot=setup.rounded,
        quantize_kv=setup.kv,
    )


def stages_of(setup: Setup) -> tuple[Stage, ...]:
    """Return the stages of a setup, their optional passes in the drawn order."""
    stages = [RAISE, FUSE]
    if setup.steps:
        left_out = {"gather_last_tokens"} - ({"gather_last_tokens"} if setup.gathered else set())
        left_out |= set() if setup.sampled else {"sample_tokens"}
        kept = tuple(p for p in REWRITE.passes if info_of(p).name not in left_out)
        stages.insert(1, replace(REWRITE, passes=kept))
    return tuple(reorder(stage, setup.order) for stage in stages)


def reorder(stage: Stage, seed: int) -> Stage:
    """Let optional passes change places among themselves; required ones stay where they are."""
    if not seed:
        return stage
    optional = [i for i, p in enumerate(stage.passes) if not info_of(p).required]
    moved = random.Random(seed).sample(optional, len(optional))
    passes = list(stage.passes)
    for place, source in zip(optional, moved):
        passes[place] = stage.passes[source]
    return replace(stage, passes=tuple(passes))


def _check_kept(results: Sequence[PassResult], setup: Setup) -> None:
    """No pass crashed or failed its certificate: the runner would have reverted it in silence."""
    for result in results:
        if not result.kept and result.name not in setup.disabled:
            raise FuzzFailure(f"reverted: {result.name}: {result.reason}")


def _check_tokens(
    example: Example, level_1: IRModule, compiled: Runnable, outcome: Outcome
) -> None:
    weights = weights_of(level_1)
    for tokens in example.setup.tokens:
        values = {**example.program.values(tokens, example.setup.seed), **weights}
        # raise_positions asks for them where the program counts its tokens: one sequence here
        values.setdefault("positions", torch.arange(tokens))
        free = {n: v for n, v in values.items() if n not in compiled.module.weights}
        wanted = {e.name for e in compiled.program.inputs}
        given = {n: _as_widened(v) for n, v in free.items() if n in wanted}
        right = Reference(level_1, values, multiplied_as(example))
        judge(right, compiled({"T": tokens}, **given), outcome, f"T={tokens}")


def weights_of(module: IRModule) -> dict[str, Tensor]:
    """Return the weights of a program by placeholder name, as its recipes make them."""
    with torch.no_grad():
        return {name: r.run(module.tensors) for name, r in module.weights.items()}


def _as_widened(value: Tensor) -> Tensor:
    """Return an activation as the compiled step takes it: half precision is float32 there."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def multiplied_as(example: Example) -> float:
    """Return the rounding of what linears multiply; 0 where they multiply float32 as it is."""
    kinds = {p.dtype for p in example.program.parameters if p.kind == "weight"}
    return TWO_PARTS if example.setup.target == "triton" and "bf16" in kinds else 0.0


@dataclass
class Reference:
    """What eager makes of values by name, in float64 and in float32; parts of it are asked for."""

    level_1: IRModule
    values: dict[str, Tensor]
    multiplied: float = 0.0

    @functools.cached_property
    def oracle(self) -> list[Tensor]:
        return run_eager(self.level_1, self.values, torch.float64)

    @functools.cached_property
    def eager(self) -> list[Tensor]:
        return run_eager(self.level_1, self.values, torch.float32)

    @functools.cached_property
    def noise(self) -> list[float]:
        return second_opinion(self.level_1, self.values, self.oracle, self.multiplied)


def judge(
    right: Reference,
    got: Sequence[Tensor],
    outcome: Outcome,
    where: str,
    pick: Callable[[int, Tensor], Tensor] = lambda index, value: value,
) -> None:
    """Compare results with eager float32 and float64 on the same values. Raises FuzzFailure.

    pick: the part of an output (by its index) that `got` has.
    """
    oracle = [pick(i, v) for i, v in enumerate(right.oracle)]
    eager = [pick(i, v) for i, v in enumerate(right.eager)]
    verdicts = compare(oracle, eager, got)
    wrong = [v for v in verdicts if not v.holds]
    if wrong:
        noise = right.noise
        outcome.second = True
        wrong = [v for v in wrong if v.error > FACTOR * noise[v.output]]
    for verdict in wrong:
        raise FuzzFailure(message(verdict, where))
    outcome.worst = max([outcome.worst, *(v.error / v.budget for v in verdicts if v.budget)])


def message(verdict: Verdict, where: str) -> str:
    """Say what is wrong with an output."""
    return (
        f"wrong: output {verdict.output} at {where}: error {verdict.error:.3g}, "
        f"allowed {verdict.budget:.3g} of the largest value"
    )
