"""Choose among the candidates of kernels by a GPU's clock, in their fused context.

What is timed is the whole step as one captured graph: real weights and strides, a cold second-level
cache, each kernel beside the neighbours that it overlaps. A graph has one candidate of one kernel,
in all layers; the graph with none and all the others take turns. A candidate is chosen if its pairs
say clearly that the step is faster (the statistics of select_kernels.py); what is chosen for one
step is then timed together. Every candidate is compiled before, and must give the bits of the
standard kernels, results and key-value pages: else it is not used, and the ledger says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from aios_compile.codegen.kernel_choices import STANDARD, KernelChoices, Trial
from aios_compile.codegen.triton.kernel_ledger import Entry, rows_name
from aios_compile.runtime.batch import Batch
from aios_compile.runtime.device import Graph, Memory
from aios_compile.runtime.gpu_executor import GpuExecutor
from aios_compile.runtime.select_kernels import judged, one_a_kernel

MOST_ROUNDS, LEAST_ROUNDS = 25, 9
CLEARLY = 1.003  # times as fast is a step, of which a kernel is a part, in the median
TOGETHER = "all that are chosen"
Names = Mapping[str, str]  # kernel -> candidate; the standard where there is none


@dataclass(frozen=True)
class Range:
    """The variant of a kernel that a step runs. signature, most: its place in the shipped ledger;
    standard: the name of the model's choice; candidates: of the others.
    """

    signature: str
    most: int | None
    standard: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Bits:
    """All that a step leaves behind. pages: a copy of the cache, on the device: it may be large."""

    results: bytes
    pages: Memory

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Bits) and self.results == other.results
        return same and bool(self.pages.equal(other.pages))  # type: ignore[attr-defined]


class TimedStep(Protocol):
    """A step that can be captured with any candidates and run again and again."""

    tokens: int

    def ranges(self) -> Mapping[str, Range]:
        """Return what each kernel with candidates for this step has."""
        ...

    def graph(self, names: Names) -> Graph:
        """Return the step's graph with these candidates. Raises what a device raises."""
        ...

    def bits(self, graph: Graph) -> object:
        """Run a graph; return something that equals only what the same results and pages give."""
        ...

    def micros(self, graph: Graph) -> float:
        """Run a graph on cold caches; return its microseconds."""
        ...


class DeviceStep:
    """A batch on an executor of which nothing else asks anything meanwhile."""

    def __init__(self, executor: GpuExecutor, batch: Batch) -> None:
        self.tokens, self._executor = batch.num_tokens, executor
        self._rows = batch.num_rows
        executor.choices = KernelChoices()
        executor.step(batch)  # what it reads is on the device from now on
        bucket = next(b for b in executor.buckets if b >= max(batch.num_tokens, batch.num_rows))
        self._sizes = executor.sizes_of(bucket)
        self._marks = executor.device.mark(), executor.device.mark()

    def ranges(self) -> dict[str, Range]:
        executor, found = self._executor, {}
        for kernel, module in zip(executor.program.kernels, executor.modules):
            variant = module.variant_of(**self._sizes) if kernel.candidates else {}
            if variant.get("candidates"):
                signature, names = kernel.candidates[0].type, tuple(variant["candidates"])
                found[kernel.name] = Range(signature, variant["most"], variant["name"], names)
        return found

    def graph(self, names: Names) -> Graph:
        executor = self._executor
        executor.choices = KernelChoices((), {kernel: (name,) for kernel, name in names.items()})
        try:
            run = partial(executor.launch_all, self._sizes)
            run()  # loads what a capture may not load
            executor.device.synchronize()
            return executor.device.capture(run)
        finally:
            executor.choices = KernelChoices()

    def bits(self, graph: Graph) -> Bits:
        executor, device = self._executor, self._executor.device
        executor.poison()  # what a kernel does not write is not what another one left
        graph.replay()
        executor.results.download(self._sizes["R"])
        device.synchronize()
        views = executor.results.views(self._sizes["R"], self._rows)
        found = [views[name].tobytes() for name in sorted(views)]
        if executor.results.has_logits:
            found.append(executor.read_logits(self._rows).tobytes())
        return Bits(b"".join(found), executor.copy_of_states())

    def micros(self, graph: Graph) -> float:
        first, last = self._marks
        self._executor.device.flush_cache()
        first.record()
        graph.replay()
        last.record()
        last.wait()
        return last.micros_since(first)


@dataclass
class Selection:
    """What was found: the choices of the artefact, and entries for the ledger of the GPU."""

    choices: KernelChoices
    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)


def select_on_device(
    steps: Sequence[Callable[[], TimedStep]],
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> Selection:
    """Return what is best for steps of up to so many tokens as each of `steps` has, ascending.

    The last one stands for all that are longer. Takes about `seconds` for all of them together.
    """
    begin = now()
    buckets: list[int] = []
    chosen: dict[str, list[str]] = {}
    trials: list[Trial] = []
    notes: list[str] = []
    entries: dict[str, dict[str, Entry]] = {}
    for number, make in enumerate(steps):
        step, left = make(), begin + seconds - now()
        found, rounds = _trials(step, left / (len(steps) - number), now, notes)
        best = {t.kernel: t for t in found if t.chosen}
        for kernel, names in chosen.items():
            names.append(best[kernel].candidate if kernel in best else STANDARD)
        for kernel in best.keys() - chosen.keys():
            chosen[kernel] = [STANDARD] * len(buckets) + [best[kernel].candidate]
        buckets.append(step.tokens)
        trials += found
        _enter(entries, step, found, rounds)
    notes.append(f"{len(trials)} trials in {now() - begin:.1f} s")
    kept = {kernel: tuple(names) for kernel, names in chosen.items()}
    choices = KernelChoices(tuple(buckets[:-1]), kept, tuple(trials), tuple(notes))
    return Selection(choices, entries)


def _trials(
    step: TimedStep, seconds: float, now: Callable[[], float], notes: list[str]
) -> tuple[list[Trial], int]:
    """Return the trials of one step and how many pairs each has; `notes` is told of the rest."""
    end, told = now() + seconds, f"{step.tokens} tokens: "
    lists = [[(k, name) for name in r.candidates] for k, r in step.ranges().items()]
    deepest = max(map(len, lists), default=0)
    wanted = [some[i] for i in range(deepest) for some in lists if i < len(some)]
    if not wanted or seconds <= 0:
        notes.append(told + ("not timed, no time is left" if wanted else "no candidate"))
        return [], 0
    standard = step.graph({})
    bits = step.bits(standard)
    graphs: dict[tuple[str, str], Graph] = {}
    for number, (kernel, name) in enumerate(wanted):
        if now() > end - seconds / 2:  # the rest is for the clock
            notes.append(told + f"{len(wanted) - number} of {len(wanted)} candidates not tried")
            break
        try:
            graph = step.graph({kernel: name})
            same = step.bits(graph) == bits
        except Exception as error:  # noqa: BLE001 - a compiler or a driver raises what it likes
            notes.append(told + f"{kernel}: {name} does not run: {type(error).__name__}: {error}")
            continue
        if same:
            graphs[kernel, name] = graph
        else:
            notes.append(told + f"{kernel}: {name} is not used, its results differ")
    begin = now()
    step.micros(standard)
    turn = max(now() - begin, 1e-9)
    left = end - now()
    fitting = int(left / (LEAST_ROUNDS * turn)) - 1
    if fitting < len(graphs):
        notes.append(told + f"{len(graphs) - max(0, fitting)} candidates do not fit the time")
        graphs = dict(list(graphs.items())[: max(0, fitting)])
    if not graphs:
        return [], 0
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(left / (turn * (1 + len(graphs))))))
    times = _by_turns(step, {("", STANDARD): standard, **graphs}, rounds)
    before = np.array(times["", STANDARD])
    trials = one_a_kernel(
        [judged(k, step.tokens, n, before, np.array(times[k, n]), CLEARLY) for k, n in graphs]
    )
    return _together(step, standard, bits, trials, rounds, notes), rounds


def _by_turns(
    step: TimedStep, graphs: Mapping[tuple[str, str], Graph], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Return the microseconds of each graph in each round; the order turns round every time."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in graphs}
    for number in range(rounds):
        for key in list(graphs)[:: 1 if number % 2 == 0 else -1]:
            times[key].append(step.micros(graphs[key]))
    return times


def _together(
    step: TimedStep, standard: Graph, bits: object, trials: list[Trial], rounds: int,
    notes: list[str],
) -> list[Trial]:  # fmt: skip
    """Time all that is chosen at once; if that is not clearly faster, only the best one stays."""
    chosen = [t for t in trials if t.chosen]
    if len(chosen) < 2:
        return trials
    graph = step.graph({t.kernel: t.candidate for t in chosen})
    same = step.bits(graph) == bits
    keys = {("", STANDARD): standard, ("", TOGETHER): graph}
    before, after = map(np.array, _by_turns(step, keys, rounds).values())
    found = judged(TOGETHER, step.tokens, f"{len(chosen)} kernels", before, after, CLEARLY)
    notes.append(str(found) if same else f"{step.tokens} tokens: together the results differ")
    if same and found.chosen:
        return trials
    best = max(chosen, key=lambda t: t.speedup)
    return [t if t is best else Trial(**{**vars(t), "chosen": False}) for t in trials]


def _enter(
    entries: dict[str, dict[str, Entry]], step: TimedStep, trials: list[Trial], rounds: int
) -> None:
    """Add what the ledger of the GPU keeps: of each kernel that was timed, the best."""
    best = {t.kernel: t for t in trials}
    best |= {t.kernel: t for t in trials if t.chosen}
    for kernel, trial in best.items():
        known = step.ranges()[kernel]
        name, speedup = (trial.candidate, trial.speedup) if trial.chosen else (known.standard, 1.0)
        entry = Entry(name, step.tokens, trial.standard_us, speedup, rounds)
        entries.setdefault(known.signature, {})[rows_name(known.most)] = entry
