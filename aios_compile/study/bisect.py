"""Find what makes an output wrong: the first pass, else the first kernel, else the step.

Passes: each is certified on the model's own weights, all layers and the given prompt, and the first
one that does not hold ends the search; within it, the first node that leads to the wrong output by
values that the program before did not have. Kernels: each one of level 3 is built alone and run on
what PyTorch computes before it, against its body in float64. The step: the whole compiled model
against level 3.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from aios_compile.capture.compare import compare_with_eager
from aios_compile.codegen.cpp.emitters import EMITTERS
from aios_compile.codegen.emit_kernels import Emitted, emit_kernels
from aios_compile.codegen.pack_weights import CheckpointTensors
from aios_compile.codegen.targets import emit
from aios_compile.compile_settings import capture_for, pass_options
from aios_compile.config import CompileOptions
from aios_compile.errors import CaptureError, CheckpointError, ConfigError
from aios_compile.ir import inputs, provenance, snapshot
from aios_compile.ir.module import IRModule, is_kernel_call
from aios_compile.ir.random_weights import RandomWeights
from aios_compile.ir.refresh import refresh
from aios_compile.model_source import ModelSource
from aios_compile.passes.certificate import FACTORS, Certifier
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import PassFunction, info_of
from aios_compile.passes.measure import FLOOR_ROUNDINGS, Samples, one_thread, run_steps
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.runner import Stage, run_pipeline
from aios_compile.runtime.torch_device import card_name, open_device
from aios_compile.study.kernel_check import Checked, Kernels, check
from aios_compile.study.node_values import Trace, first_difference
from aios_compile.study.triton_check import TritonKernels

MAX_TOKENS = 8 * inputs.PAGE_SIZE  # what the smallest page table holds
Say = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """What is wrong. kind: "capture", "pass", "kernel", "step", or "" when everything is right.

    name: the pass or kernel. node: the first wrong node, with its op. source_line: of the model.
    file: where to look in the compiler. bisect: AIOS_BISECT=n with it, -1 for a required pass.
    """

    kind: str = ""
    name: str = ""
    node: str = ""
    source_line: str = ""
    file: str = ""
    detail: str = ""
    error: float = 0.0
    budget: float = 0.0
    bisect: int = -1

    def __str__(self) -> str:
        if not self.kind:
            return "nothing is wrong: capture, passes, kernels and the step hold their budgets"
        rows = [
            ("differs with" if self.kind == "setting" else f"first wrong {self.kind}", self.name),
            ("first wrong node", self.node),
            ("model line", self.source_line),
            ("look into", self.file),
            ("measured", f"error {self.error:.2e}, allowed {self.budget:.2e}; {self.detail}"),
        ]
        lines = [f"{title:<18} {value}" for title, value in rows if value]
        if self.bisect > 0:
            lines.append(f"AIOS_BISECT={self.bisect - 1} stops before it, {self.bisect} has it")
        return "\n".join(lines)


@dataclass
class Subject:
    """What is searched: a captured program with its weights, and a prompt of token ids."""

    captured: IRModule
    options: PassOptions
    weights: RandomWeights
    prompt: tuple[int, ...]
    seed: int = 0

    @property
    def samples(self) -> Samples:
        return Samples((len(self.prompt),), self.prompt, whole=True)


def open_subject(source: ModelSource, options: CompileOptions, prompt: Sequence[int]) -> Subject:
    """Capture a model and read its weights. Raises CaptureError when capture is wrong already."""
    limit = min(MAX_TOKENS, source.max_model_len)
    if not 1 <= len(prompt) <= limit:
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens, expected 1 to {limit}",
            advice="give a shorter --prompt, or --tokens N",
        )
    sizes = options.resolve_sizes(source.max_model_len)
    model = source.build()
    captured = capture_for(model, source, sizes)
    compare_with_eager(model, captured, seed=options.seed)
    tensors = CheckpointTensors(captured, source.read)
    weights = RandomWeights.of(captured, options.seed)
    names = {name for recipe in captured.weights.values() for name in recipe.names}
    read = {n: t.to(weights.dtypes.get(n, t.dtype)) for n, t in _read(tensors, names).items()}
    weights.known = {**weights.known, **read}
    passes = pass_options(options, sizes, model)
    return Subject(captured, passes, weights, tuple(prompt), options.seed)


def _read(tensors: CheckpointTensors, names: Iterable[str]) -> dict[str, Tensor]:
    found = {}
    for name in sorted(names):
        try:
            found[name] = tensors[name]
        except CheckpointError as error:
            raise CheckpointError(
                error.message, advice="bisect needs the model's weights"
            ) from None
    return found


def find_wrong_capture(error: CaptureError) -> Finding:
    """Return the finding for a program that differs from its model as soon as it is captured."""
    line = error.source_line or ""
    return Finding("capture", "capture", "", line, "capture/", error.message)


class Step(NamedTuple):
    """A pass that changed the program, how often, and the program before."""

    function: PassFunction
    num_hits: int
    saved: IRModule


def steps(
    subject: Subject, module: IRModule, stages: Sequence[Stage], disabled: Sequence[str]
) -> Iterator[Step]:
    """Run the stages on `module`, pass by pass; yield after each that changed it."""
    for stage in stages:
        for function in stage.passes:
            info = info_of(function)
            if info.name in disabled or not info.runs_on(subject.options.target):
                continue
            saved = snapshot.take(module)
            one = Stage(module.level, (function,))
            (result,) = run_pipeline(module, [one], subject.options, verify=0)
            if result.kept and result.hits:
                yield Step(function, result.hits, saved)
        done = Stage(stage.level_after, (), stage.analysis)
        run_pipeline(module, [done], subject.options, verify=0)


def find_wrong_pass(
    subject: Subject,
    stages: Sequence[Stage] = STAGES,
    disabled: Sequence[str] = (),
    say: Say = lambda text: None,
) -> tuple[Finding, IRModule]:
    """Return the first pass whose certificate does not hold, and the program that it started from.

    Without one the finding is empty and the program is level 3.
    """
    module = snapshot.take(subject.captured)
    certifier = Certifier(
        module, subject.options, subject.seed, None, subject.samples, subject.weights
    )
    optional = 0
    for function, num_hits, saved in steps(subject, module, stages, disabled):
        info = info_of(function)
        optional += 0 if info.required else num_hits
        certificate = certifier.measure(saved, module, function)
        say(f"{info.name}: error {certificate.max_error:.1e}")
        if not certificate.holds:
            found = Finding(
                "pass",
                info.name,
                file=f"passes/{info.name}.py",
                detail=certificate.where,
                error=certificate.max_error,
                budget=certificate.error_budget,
                bisect=-1 if info.required else optional,
            )
            return with_node(found, subject, saved, module), saved
    return Finding(), module


def with_node(found: Finding, subject: Subject, before: IRModule, after: IRModule) -> Finding:
    """Add the first wrong node of the program after a pass."""
    traces = [_trace(subject, m, torch.float64)[0] for m in (before, after)]
    node = None
    for output in range(len(after.outputs)):
        node = node or first_difference(traces[0], traces[1], output)
    return found if node is None else _placed(found, node)


def _placed(found: Finding, node: fx.Node) -> Finding:
    lines = provenance.source_lines(node)
    name = f"{node.name} = {snapshot.target_name(node)}"
    return replace(found, node=name, source_line=lines[0] if lines else "")


def _trace(
    subject: Subject, module: IRModule, dtype: torch.dtype | None
) -> tuple[Trace, Mapping[str, int]]:
    """Run a program on the whole prompt at once; return all values and the sizes of the step."""
    step = inputs.whole(len(subject.prompt))
    trace = Trace(module)
    with one_thread():
        run_steps(
            module,
            [step],
            subject.weights,
            {},
            subject.seed,
            computed_in=dtype,
            prompt=subject.prompt,
            watch=trace.watch,
        )
    return trace, {**inputs.sizes_of(step), "P": subject.options.max_pages_per_sequence}


def find_wrong_kernel(
    subject: Subject,
    module: IRModule,
    emitters: Sequence[ModuleType] = EMITTERS,
    folder: Path | None = None,
    say: Say = lambda text: None,
    device: str = "cpu",
) -> Finding:
    """Run each kernel of a level-3 program on the values that PyTorch gives it; return the first
    one that is wrong. Each text is checked in the first call of it only.

    device: where the kernels of the Triton target run.
    """
    refresh(module)
    trace, sizes = _trace(subject, module, None)
    with tempfile.TemporaryDirectory() as temporary:
        where = folder or Path(temporary)
        if subject.options.target == "triton":
            on_device = open_device(device)
            emitted = emit(module, device, card=card_name(device))
            modules = TritonKernels(emitted, where, on_device)
            return _first_wrong(
                emitted, lambda c, v: modules.check(c, v, sizes), "codegen/triton/", trace, say
            )
        emitted = emit_kernels(module, emitters)
        kernels = Kernels(emitted.sources, where)
        try:
            return _first_wrong(
                emitted,
                lambda c, v: check(c, emitted, v, sizes, lambda p: p.run(kernels, splits=3)),
                "codegen/cpp/",
                trace,
                say,
            )
        finally:
            kernels.close()


def _first_wrong(
    emitted: Emitted,
    measure: Callable[[fx.Node, Sequence[Any]], Checked],
    folder: str,
    trace: Trace,
    say: Say,
) -> Finding:
    """Return the first kernel call of a trace whose kernel is wrong on the values of the trace."""
    done: set[int] = set()
    for (region, call), _ in list(trace.values.items()):
        if not is_kernel_call(call) or emitted.by_call[call] in done:
            continue
        source = emitted.sources[emitted.by_call[call]]
        done.add(emitted.by_call[call])
        places: list[Any] = [(region, a) for a in call.args]
        checked = measure(call, [trace.values.get(place, place[1]) for place in places])
        say(f"{source.name}: error {checked.error:.1e}")
        if not checked.holds:
            found = Finding(
                "kernel",
                source.name,
                file=f"{folder} (kind {call.meta.get('kernel', '')})",
                detail=f"in call {region or 'of the outer graph'}",
                error=checked.error,
                budget=checked.budget,
            )
            return _placed(found, call)
    return Finding()


def find_wrong_step(subject: Subject, module: IRModule, logits: Tensor) -> Finding:
    """Compare the logits [T, V] of the compiled model with its level-3 program, whose passes and
    kernels are right: the plan, step.cpp and the runtime's batches are left. Not with level 1:
    lossy passes are meant.

    The model must keep its keys and values in float32, as the programs here do.
    """
    wide, budget = oracle_of(subject, module, native=True)
    error = relative_error(logits, wide)
    if error <= budget:
        return Finding()
    file = "passes/plan_memory.py, codegen/lower.py, codegen/cpp/step.py, runtime/batch_builder.py"
    detail = "each kernel is right alone"
    return Finding("step", "the step", file=file, detail=detail, error=error, budget=budget)


def oracle_of(subject: Subject, module: IRModule, *, native: bool = False) -> tuple[Tensor, float]:
    """Return a program's logits [T, V] in float64, and the error that a certificate would allow.

    native: the error of what the kernels compute, who round activations where a pass meant it.
    """
    narrow = logits_of(subject, module, None if native else torch.float32)
    wide = logits_of(subject, module, torch.float64)
    floor = FLOOR_ROUNDINGS * torch.finfo(torch.float32).eps
    return wide, FACTORS["reassociates"] * relative_error(narrow, wide) + floor


def relative_error(logits: Tensor, oracle: Tensor) -> float:
    """Return the largest difference, in units of the oracle's largest value."""
    scale = float(oracle.abs().max()) or 1.0
    return float((logits.double() - oracle).abs().max()) / scale


def logits_of(subject: Subject, module: IRModule, dtype: torch.dtype | None) -> Tensor:
    """Return the logits [T, V] of the whole prompt, computed in a dtype, as float64.

    dtype: None for that of each value, with activations rounded as the kernels do.
    """
    tokens = len(subject.prompt)
    step = replace(inputs.whole(tokens), rows=tuple(range(tokens)))
    with one_thread():
        run = run_steps(
            module, [step], subject.weights, {}, subject.seed,
            computed_in=dtype, prompt=subject.prompt, rounds_activations=dtype is None,
        )  # fmt: skip
    value = run.outputs[module.outputs[0]]
    return value.reshape(-1, value.shape[-1]).double()
