"""Try an edited kernel: build it, compare it with its reference, time it against the original.

It is used only if it is right: for several numbers of tokens, on the operands of a real step of
random weights, it keeps the budget that generated kernels keep, and any split of its work items
gives the same bits.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from aios_compile.codegen.emit_kernels import Emitted
from aios_compile.codegen.source import KernelSource
from aios_compile.errors import BuildError
from aios_compile.ir import inputs
from aios_compile.ir.module import IRModule, is_kernel_call
from aios_compile.ir.random_weights import RandomWeights
from aios_compile.passes.measure import one_thread, run_steps
from aios_compile.passes.sampled_layers import choose_skips
from aios_compile.study.kernel_check import Checked, Kernels, check, prepare
from aios_compile.study.node_values import Trace

TOKENS = (1, 5, 19)
LIMIT_SECONDS = 120
DIGITS = re.compile(r"_[0-9a-f]{8}$")  # of a kernel's text, at the end of its name
SLOWER = 1.1  # times the generated kernel; less is noise of the clock


@dataclass(frozen=True)
class Verdict:
    """What became of one edit. used: it is right. times: how long it takes, 1.0 is the original."""

    name: str
    used: bool
    reason: str = ""
    error: float = 0.0
    budget: float = 0.0
    times: float = 0.0

    def __str__(self) -> str:
        if not self.used:
            return f"the edit of {self.name} is not used: {self.reason}"
        slower = ": it is slower, --revert takes it back" if self.times > SLOWER else ""
        return (
            f"{self.name} is edited: error {self.error:.1e} of {self.budget:.1e} allowed, "
            f"{self.times:.2f} times as long as the generated kernel{slower}"
        )


def apply_overrides(
    module: IRModule,
    emitted: Emitted,
    edits: dict[str, str],
    weights: RandomWeights,
    width: int,
    folder: Path,
) -> list[Verdict]:
    """Replace the texts of edited kernels that are right; return what became of each edit.

    Edits of kernels that this program does not have are left alone; of those that differ from one
    of its kernels in the digits of the name only, it is told. weights: random ones that know level
    1. width: entries of a page table. folder: keeps built objects.
    """
    named = [(i, source) for i, source in enumerate(emitted.sources) if source.name in edits]
    wanted = [i for i, source in named if source.language == "cpp"]
    verdicts = [
        Verdict(s.name, False, "edits of Triton kernels are not tried yet")
        for _, s in named
        if s.language != "cpp"
    ]
    verdicts += _of_other_texts(edits, [s.name for s in emitted.sources])
    if not wanted:
        return verdicts
    weights.learn(module)
    samples = [sample_calls(module, emitted, wanted, weights, tokens, width) for tokens in TOKENS]
    for index in wanted:
        source = emitted.sources[index]
        # what was edited runs, not a candidate in its place, which nobody has checked again
        edited = replace(source, text=edits[source.name], candidates=())
        own = [sample[index] for sample in samples]
        verdict = _in_child(source.name, partial(_verdict, source, edited, emitted, own, folder))
        if verdict.used:
            emitted.sources[index] = edited
        verdicts.append(verdict)
    return verdicts


def _of_other_texts(edits: Iterable[str], names: Sequence[str]) -> list[Verdict]:
    """Tell of the edits whose name is that of a kernel but for the digits of its text."""
    found = []
    for edit in sorted(set(edits) - set(names)):
        meant = [n for n in names if DIGITS.sub("", n) == DIGITS.sub("", edit)]
        if meant:
            reason = f"it is of another text; this model has {', '.join(meant)}"
            found.append(Verdict(edit, False, reason))
    return found


@dataclass(frozen=True)
class Sample:
    """A call of a kernel, the values of its arguments, the sizes of the step."""

    call: fx.Node
    values: list[Any]
    sizes: dict[str, int]


def sample_calls(
    module: IRModule,
    emitted: Emitted,
    wanted: Sequence[int],
    weights: RandomWeights,
    num_tokens: int,
    width: int,
) -> dict[int, Sample]:
    """Run one step in PyTorch, one layer of each kind; return the wanted kernels' operands."""
    whole = bool(module.not_generatable) or "slots" not in module.inputs.values()
    step = inputs.whole(num_tokens) if whole else inputs.mixed(num_tokens)
    trace = Trace(module)
    skips, _ = choose_skips(module, module, 0)
    with one_thread():
        run_steps(module, [step], weights, skips, 0, watch=trace.watch)
    sizes = {**inputs.sizes_of(step), "P": width}
    found: dict[int, Sample] = {}
    for (region, node), _ in trace.values.items():
        if is_kernel_call(node) and emitted.by_call[node] in wanted:
            places: list[Any] = [(region, a) for a in node.args]
            values = [trace.values.get(place, place[1]) for place in places]
            found.setdefault(emitted.by_call[node], Sample(node, values, sizes))
    return found


def _in_child(name: str, find: Callable[[], Verdict]) -> Verdict:
    """Run `find` in a process of its own, which a wrong kernel may crash or never leave."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        faulthandler.disable()  # what a crash is worth is said in one line
        signal.alarm(LIMIT_SECONDS)
        try:
            with one_thread():
                data = json.dumps(asdict(find()))
            os.write(writer, data.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return Verdict(**json.loads(answer))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return Verdict(name, False, f"it runs for more than {LIMIT_SECONDS} s")
    return Verdict(name, False, f"it crashes (status {status})")


def _verdict(
    source: KernelSource,
    edited: KernelSource,
    emitted: Emitted,
    samples: Sequence[Sample],
    folder: Path,
) -> Verdict:
    with tempfile.TemporaryDirectory() as temporary:
        try:
            original = Kernels([source], Path(temporary) / "original", folder)
            candidate = Kernels([edited], Path(temporary) / "edited", folder)
        except BuildError as error:
            return Verdict(source.name, False, f"it does not compile: {error.message}")
        try:
            if not candidate.has(source.symbol):
                return Verdict(source.name, False, f"it does not define {source.symbol}")
            checks = []
            for sample in samples:
                checked = _check(sample, emitted, candidate)
                if isinstance(checked, str):
                    return Verdict(source.name, False, checked)
                checks.append(checked)
            worst = max(checks, key=lambda c: c.error / c.budget)
            last = samples[-1]
            prepared = prepare(last.call, emitted, last.values, last.sizes)
            times = prepared.times(candidate, original)
            return Verdict(source.name, True, "", worst.error, worst.budget, times)
        finally:
            original.close()
            candidate.close()


def _check(sample: Sample, emitted: Emitted, kernels: Kernels) -> Checked | str:
    """Return how right a kernel is, or why it is not."""
    arguments = sample.call, emitted, sample.values, sample.sizes
    tokens = sample.sizes["T"]
    checked = check(*arguments, lambda p: p.run(kernels, splits=3))
    if not checked.holds:
        return (
            f"error {checked.error:.2e} against float64 at T={tokens}, "
            f"allowed are {checked.budget:.2e}"
        )
    parts = []
    for splits in (1, 2):
        prepared = prepare(*arguments)
        prepared.run(kernels, splits=splits)
        parts.append(prepared.tensors())
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*parts))
    return checked if same else f"its result depends on how the work is split, at T={tokens}"
