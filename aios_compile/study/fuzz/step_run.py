"""Run a compiled program as the engine does, step by step over pages, against whole sequences."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aios_compile.ir import evaluate, sample_op
from aios_compile.ir.module import IRModule, outputs, placeholders
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantized import dequantize
from aios_compile.passes.measure import FLOOR_ROUNDINGS
from aios_compile.passes.sample_tokens import RESULTS
from aios_compile.study.fuzz import batches
from aios_compile.study.fuzz.batches import MAX_TOKENS, Chunk, Plan
from aios_compile.study.fuzz.program import Program
from aios_compile.study.fuzz.rounded_attention import with_rounded_attention

if TYPE_CHECKING:
    from aios_compile.study.fuzz.example import Example, Outcome, Runnable

__all__ = ["MAX_TOKENS", "check"]


def check(example: Example, level_1: IRModule, compiled: Runnable, outcome: Outcome) -> None:
    """Run all steps of a drawn plan; compare the rows of each. Raises FuzzFailure."""
    setup = example.setup
    rng = random.Random(setup.seed)
    plan = batches.draw_plan(rng)
    if compiled.module.not_generatable:
        plan = batches.whole(rng.choice(batches.LENGTHS))
    run = _Run(example, level_1, compiled, plan)
    if setup.lossy:
        run.check_level_3(outcome)
    else:
        run.check_sequences(outcome)


class _Run:
    """One example over one plan."""

    def __init__(self, example: Example, level_1: IRModule, compiled: Runnable, plan: Plan) -> None:
        self.example, self.level_1, self.compiled, self.plan = example, level_1, compiled, plan
        self.seed = example.setup.seed
        self.names = [e.name for e in compiled.program.inputs]
        self.values = [self._sequence(s, n) for s, n in enumerate(plan.lengths)]
        self.count = len(outputs(level_1.root.graph))
        self.exact_activations = example.setup.target == "triton"
        self.axes = [_token_axis(n.meta["val"]) for n in outputs(level_1.root.graph)]

    def _sequence(self, sequence: int, length: int) -> dict[str, Tensor]:
        """Return a sequence's activations; what has no token axis is the same for all."""
        program: Program = self.example.program
        found = {}
        for p in program.parameters:
            own = self.seed + 7919 * sequence if "T" in p.shape else self.seed
            if p.kind != "weight":
                found[p.name] = p.value(length, own)
        return found

    def inputs(self, step: Sequence[Chunk]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return everything that a step reads, and its sizes."""
        ids = [torch.zeros(n, dtype=torch.int64) for n in self.plan.lengths]
        made, sizes = batches.runtime_inputs(self.compiled.module, self.plan, step, ids, self.seed)
        for p in self.example.program.parameters:
            if p.kind == "weight" or p.name == "positions":
                continue
            if "T" not in p.shape:
                made[p.name] = self.values[0][p.name]
            else:
                axis = p.shape.index("T")
                parts = [
                    self.values[c.sequence][p.name].narrow(axis, c.begin, c.count) for c in step
                ]
                made[p.name] = torch.cat(parts, axis)
            if made[p.name].dtype in (torch.bfloat16, torch.float16):
                made[p.name] = made[p.name].float()
        return made, sizes

    def check_sequences(self, outcome: Outcome) -> None:
        """Hold every chunk against the whole sequence in eager."""
        from aios_compile.study.fuzz.example import Reference, judge, multiplied_as, weights_of

        weights, multiplied = weights_of(self.level_1), multiplied_as(self.example)
        right = [
            Reference(self.level_1, {**values, **weights}, multiplied) for values in self.values
        ]
        for number, step in enumerate(self.plan.steps):
            made, sizes = self.inputs(step)
            got = self.compiled(sizes, **{n: made[n] for n in self.names})
            at = 0
            rows = made["logit_rows"].tolist()
            for chunk in step:
                mine = [r for r in rows if at <= r < at + chunk.count]
                parts = [
                    self._rows(i, v, at, chunk, mine, rows) for i, v in enumerate(got[: self.count])
                ]
                where = f"step {number}, sequence {chunk.sequence} from {chunk.begin}"
                local = [r - at + chunk.begin for r in mine]
                pick = functools.partial(self._wanted, chunk, local)
                judge(right[chunk.sequence], parts, outcome, where, pick)
                at += chunk.count
            if self.example.setup.sampled:
                self._check_sampled(got, made, number)

    def _gathered(self, index: int) -> bool:
        return index == 0 and self.example.setup.gathered

    def _rows(
        self, index: int, got: Tensor, at: int, chunk: Chunk, mine: list[int], rows: list[int]
    ) -> Tensor:
        """Return a chunk's part of an output of the step."""
        if self._gathered(index):
            return got[[rows.index(r) for r in mine]]
        axis = self.axes[index]
        return got if axis is None else got.narrow(axis, at, chunk.count)

    def _wanted(self, chunk: Chunk, local: list[int], index: int, value: Tensor) -> Tensor:
        """Return the same part of an output of the whole sequence."""
        if self._gathered(index):
            return value[local]
        axis = self.axes[index]
        return value if axis is None else value.narrow(axis, chunk.begin, chunk.count)

    def _check_sampled(self, got: Sequence[Tensor], made: Mapping[str, Tensor], step: int) -> None:
        """Hold what was sampled against the sampler's reference on the same logits."""
        from aios_compile.study.fuzz.example import FuzzFailure, message
        from aios_compile.study.fuzz.judge import compare

        given = [made[name] for name in sample_op.INPUTS]
        eager = sample_op.reference(got[0], *given)
        wide = [g.double() if g.is_floating_point() else g for g in (got[0], *given)]
        oracle = sample_op.reference(*wide)
        found = dict(zip(RESULTS, got[self.count : self.count + len(RESULTS)]))
        for name, o, e in zip(RESULTS, oracle, eager):
            for verdict in compare([o], [e], [found[name]]):
                if not verdict.holds:
                    raise FuzzFailure(message(verdict, f"step {step}, {name}"))

    def check_level_3(self, outcome: Outcome) -> None:
        """Hold the steps against level 3 itself: what it rounds is rounded in both.

        That level 3 is right is what the certificates say (Setup.proven). On Triton activations
        are not rounded to codes, so neither are those of level 3.
        """
        from aios_compile.study.fuzz import judge
        from aios_compile.study.fuzz.example import FuzzFailure, message
        from aios_compile.study.fuzz.judge import FACTOR, OPINIONS, STEP, Verdict, compare

        module = self.compiled.module
        if self.exact_activations and self.example.setup.kv:
            module = with_rounded_attention(module)
        oracle, eager = (self._level_3(module, d) for d in (torch.float64, torch.float32))
        rounding = judge.ROUNDING
        if self.exact_activations and not self.example.setup.kv:
            rounding = judge.TWO_PARTS
        least = FLOOR_ROUNDINGS * rounding
        if self.exact_activations and self.example.setup.kv:
            least = STEP
        verdicts: dict[int, list[Verdict]] = {}
        for number, step in enumerate(self.plan.steps):
            made, sizes = self.inputs(step)
            got = self.compiled(sizes, **{n: made[n] for n in self.names})
            found = compare(oracle[number], eager[number], got[: self.count])
            verdicts[number] = [replace(v, budget=max(v.budget, least)) for v in found]
            outcome.worst = max([outcome.worst, *(v.error / v.budget for v in verdicts[number])])
        wrong = [(n, v) for n, found in verdicts.items() for v in found if not v.holds]
        for seed in range(OPINIONS if wrong else 0):  # a code may hang on a rounding
            outcome.second = True
            noisy = self._level_3(judge.perturbed(module, seed, rounding), torch.float32)
            noise = {n: compare(oracle[n], noisy[n], noisy[n]) for n, _ in wrong}
            wrong = [(n, v) for n, v in wrong if v.error > FACTOR * noise[n][v.output].error]
        for number, verdict in wrong:
            raise FuzzFailure(message(verdict, f"step {number}"))

    def _level_3(self, module: IRModule, dtype: torch.dtype) -> list[list[Tensor]]:
        """Return the outputs of every step in eager, its states carried from step to step."""
        states = self._empty(dtype)
        steps = []
        for step in self.plan.steps:
            values = {**_weights(module), **self.inputs(step)[0]}
            given = {n: _cast(v, dtype) for n, v in values.items()} | states
            widened = _widened if self.exact_activations else None
            results, after = evaluate.run(module, given, computed_in=dtype, widened=widened)
            states.update(after)
            steps.append(list(results.values())[: self.count])
        return steps

    def _empty(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the states as they begin; codes stay codes."""
        module, found = self.compiled.module, {}
        for node in placeholders(module.root.graph):
            if node.name in module.states:
                value = node.meta["val"]
                kept = value.dtype if value.dtype.itemsize == 1 else dtype
                found[node.name] = torch.zeros(tuple(map(int, value.shape)), dtype=kept)
        return found


def _widened(weight: Tensor, form: str = "") -> Tensor:
    """Return a weight in float32, dequantised where it has a format."""
    return dequantize(weight, QuantFormat.parse(form)) if form else weight.float()


def _weights(module: IRModule) -> dict[str, Tensor]:
    from aios_compile.study.fuzz.example import weights_of

    return weights_of(module)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _token_axis(value: Any) -> int | None:
    """Return the dimension whose size is T."""
    found = [i for i, s in enumerate(value.shape) if not isinstance(s, int)]
    return found[0] if found else None
