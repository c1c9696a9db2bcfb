"""Choose among the candidates of kernels by the clock, in their fused context.

What is timed is the whole step, as it will run: all launches in order on all workers, weights from
memory, caches as the neighbours leave them. Each kernel's phases (up to the barrier that ends them)
are added up over the layers, so one step times one candidate of every kernel. Standard and
candidates take turns; a candidate is chosen if its pairs say clearly that it is faster. Candidates
are in the library already, so nothing is compiled. Each must give the bits of the standard kernels
in the steps it is timed in, or it is not used and the ledger says so: a wrong choice costs time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.kernel_choices import STANDARD, KernelChoices, Trial, everywhere
from aios_compile.codegen.operand import dim_value
from aios_compile.codegen.program import Kernel
from aios_compile.runtime.program_runner import ProgramRunner

MOST_ROUNDS, LEAST_ROUNDS = 15, 7
# Of weights in huge pages, which the hardware's prefetch follows well: 1.06-1.19x as fast as the
# standard one in int4, 0.92-1.11x in int8, 0.99-1.01x in bf16 (2 cores of Zen 4).
FIRST_IN_HUGE_PAGES = "unfetched"
CLEARLY = 1.02  # times as fast, in the median
CHANCE = 0.01  # at most, that a candidate that is no faster wins as many pairs (the sign test)


@dataclass(frozen=True)
class Step:
    """A recorded step, which can be run again: the inputs of ProgramRunner.run."""

    inputs: Mapping[str, NDArray[Any]]
    num_tokens: int
    num_seqs: int
    num_rows: int


def select_kernels(
    runner: ProgramRunner, steps: Sequence[Step], seconds: float, *, huge_pages: bool = False
) -> KernelChoices:
    """Return what is best for steps of up to so many tokens as each of `steps` has, ascending.

    The last one stands for all that are longer. Takes at most `seconds` for each, and a few steps.
    huge_pages: the weights lie in them; then the candidate FIRST_IN_HUGE_PAGES, where a kernel has
    it, is what others must beat, and what stays when the clock decides nothing.
    """
    having = {k.name: k for k in runner.program.kernels if k.candidates}
    chosen: dict[str, list[str]] = {name: [] for name in having}
    trials: list[Trial] = []
    notes: list[str] = []
    for step in steps:
        first = {
            name: FIRST_IN_HUGE_PAGES
            if huge_pages and FIRST_IN_HUGE_PAGES in _differing(kernel, step.num_tokens)
            else STANDARD
            for name, kernel in having.items()
        }
        found = _trials(runner, step, seconds, first, notes)
        trials += found
        best = {t.kernel: t.candidate for t in found if t.chosen}
        for name, names in chosen.items():
            names.append(best.get(name, first[name]))
    runner.choose(KernelChoices())
    kept = {name: tuple(names) for name, names in chosen.items()}
    buckets = tuple(step.num_tokens for step in steps[:-1])
    notes.append(f"{runner.num_threads} threads, {len(trials)} trials")
    return KernelChoices(buckets, kept, tuple(trials), tuple(notes), huge_pages)


def _trials(
    runner: ProgramRunner, step: Step, seconds: float, first: dict[str, str], notes: list[str]
) -> list[Trial]:
    """Return the candidates' trials in one step; `notes` is told of those that were not timed.

    first: of each kernel, what its candidates are held against; a wrong one is replaced.
    """
    tokens = step.num_tokens
    having = {
        name: [k for k in runner.program.kernels if name in _differing(k, tokens)]
        for name in sorted({n for k in runner.program.kernels for n in _differing(k, tokens)})
    }
    if not having:
        notes.append(f"{tokens} tokens: no candidate differs")
        return []
    _timed(runner, step, STANDARD)
    results = _results(runner, step)
    for name in list(having):
        _timed(runner, step, name)
        if _results(runner, step) != results:
            notes.append(f"{tokens} tokens: {name} is not used, its results differ: a wrong kernel")
            del having[name]
            first |= {kernel: STANDARD for kernel, base in first.items() if base == name}
    begin = time.perf_counter()
    _timed(runner, step, STANDARD)
    predicted = (time.perf_counter() - begin) * (1 + len(having))
    rounds = min(MOST_ROUNDS, int(seconds / predicted))
    if rounds < LEAST_ROUNDS:
        needed = predicted * LEAST_ROUNDS
        notes.append(f"{tokens} tokens: not timed, {LEAST_ROUNDS} rounds take {needed:.1f} s")
        return []
    times: dict[str, list[NDArray[np.int64]]] = {name: [] for name in (STANDARD, *having)}
    for i in range(rounds):
        for name in list(times)[:: 1 if i % 2 == 0 else -1]:
            times[name].append(_timed(runner, step, name))
    trials = []
    for name in times:
        for kernel in having.get(name, [k for k in runner.program.kernels if k.name in first]):
            base = first[kernel.name]
            if name == base:
                continue
            k = runner.program.kernels.index(kernel)
            before, after = (np.array(times[n], np.float64)[:, k] / 1e3 for n in (base, name))
            trials.append(judged(kernel.name, tokens, name, before, after, CLEARLY))
    return one_a_kernel(trials)


def judged(
    kernel: str,
    tokens: int,
    candidate: str,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    clearly: float,
) -> Trial:
    """Return the trial of a candidate by pairs of microseconds, without and with it.

    It is chosen if the median of the ratios is at least `clearly` and the sign test leaves less
    than CHANCE to chance.
    """
    ratios = before / np.maximum(after, 1e-3)
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    clear = middle >= clearly and _chance(ratios) <= CHANCE
    micros = float(np.median(before))
    return Trial(kernel, tokens, candidate, micros, middle, (low, high), clear)


def _chance(ratios: NDArray[np.float64]) -> float:
    """Return how likely a fair coin wins as many of so many pairs, or more."""
    count, wins = len(ratios), int((ratios > 1).sum())
    return float(sum(math.comb(count, k) for k in range(wins, count + 1)) / 2**count)


def _differing(kernel: Kernel, tokens: int) -> list[str]:
    return [c.name for c in kernel.candidates if c.least <= tokens <= c.most]


def _timed(runner: ProgramRunner, step: Step, candidate: str) -> NDArray[np.int64]:
    """Run the step with a candidate wherever it exists; return the nanoseconds of each kernel."""
    runner.choose(everywhere(runner.program, candidate))
    found = np.zeros(len(runner.program.kernels), np.int64)
    runner.time_kernels(found)
    runner.run(step.inputs, step.num_tokens, step.num_seqs, step.num_rows)
    runner.time_kernels(None)
    return found


def _results(runner: ProgramRunner, step: Step) -> bytes:
    """Return the bits of the last run's outputs."""
    sizes = {"T": step.num_tokens, "S": step.num_seqs, "R": step.num_rows}
    found = []
    for entry in runner.program.outputs:
        count = math.prod(dim_value(d, {**runner.program.sizes, **sizes}) for d in entry.shape)
        found.append(runner.outputs[entry.name].reshape(-1)[:count].tobytes())
    return b"".join(found)


def one_a_kernel(trials: list[Trial]) -> list[Trial]:
    """Leave the fastest of each kernel's clear candidates chosen."""
    best = {t.kernel: t for t in sorted(trials, key=lambda t: t.speedup) if t.chosen}
    return [
        t if not t.chosen or t is best[t.kernel] else Trial(**{**vars(t), "chosen": False})
        for t in trials
    ]
