"""The same request at every stage of the compiler: speed, launches, bytes and error, side by side.

The request is a prompt and given tokens after it, so that every stage computes the same. PyTorch
runs the module and the captured graph, on one thread, and computes the whole prefix for each token.
The stages after that are programs of their own, compiled for the target and run by the engine, a
token a step: without any optional pass, then with those of one group more. So the difference of two
lines is what the passes between them are worth. Launches and bytes are counted, tokens a second
measured; error is that of the last logits against float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from aios_compile.config import CompileOptions
from aios_compile.errors import AiosError
from aios_compile.ir import inputs, snapshot
from aios_compile.ir.inputs import Step
from aios_compile.ir.module import IRModule, placeholders
from aios_compile.model_source import ModelSource
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.measure import one_thread, run_steps
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.runner import Stage, run_pipeline
from aios_compile.study.ablation import Cost, cost_of
from aios_compile.study.bisect import Subject, open_subject
from aios_compile.study.verify_logits import materialise
from aios_compile.study.verify_logits import run as run_module

BATCH = 8
LEAST_TOKENS = 32  # that a compiled model generates
MEASURED_SECONDS = 1.0  # of a compiled model, at least


@dataclass(frozen=True)
class Rung:
    """One stage. tokens_per_second: all sequences together. error: of the last token's logits,
    relative to the largest; None where the stage gives no logits or does not compute the same.
    """

    name: str
    tokens_per_second: float
    launches: int | None = None
    bytes_a_token: int | None = None
    error: float | None = None


@dataclass(frozen=True)
class Request:
    """Token ids: `num_prompt` of them at once, the others one by one."""

    ids: tuple[int, ...]
    num_prompt: int

    @property
    def num_tokens(self) -> int:
        return len(self.ids) - self.num_prompt


def climb(
    source: ModelSource,
    options: CompileOptions,
    load: Callable[[dict[str, Any]], Any],
    request: Request,
) -> Iterator[Rung]:
    """Yield the stages from slow to quick. load: makes a compiled model, given some options."""
    subject = open_subject(source, options, request.ids)
    whole = [Step((0,), (len(request.ids),), (len(request.ids) - 1,), (len(request.ids),))]
    oracle = _last(subject, subject.captured, whole, torch.float64)
    yield _eager(source, request, oracle)
    yield _captured(subject, request, oracle)
    given = {f.name: getattr(options, f.name) for f in fields(CompileOptions)} | {"progress": False}
    with load(given) as model:  # all programs run on the threads that the whole one chooses
        if model.runner is not None:
            given["num_threads"] = model.runner.num_threads
    kernels = {"cpp": "C++", "triton": "Triton"}[subject.options.target]
    for num_groups, title in enumerate(("no optional pass", "+ raise", "+ rewrite", "+ fuse")):
        left_out = {*options.disable_passes, *_optional(STAGES[num_groups:], subject)}
        try:
            cost = _cost(subject, left_out, len(request.ids))
            with load(given | {"disable_passes": tuple(sorted(left_out))}) as model:
                yield _compiled(f"{kernels}, {title}", model, request, 1, cost, oracle)
                if num_groups == len(STAGES):
                    yield _compiled(f"{BATCH} sequences in a batch", model, request, BATCH, cost)
        except AiosError as error:
            yield Rung(f"{kernels}, {title}: {error.message}", 0.0)
    if options.quantization is None:
        form = CompileOptions(quantization="int8").quantization_format()
        quantised = replace(subject, options=replace(subject.options, quantization=form))
        try:
            plain = _cost(subject, options.disable_passes, len(request.ids))
            cost = _cost(quantised, options.disable_passes, len(request.ids))
            if cost == plain:
                yield Rung("int8 weights: no matrix has rows of whole groups of 32", 0.0)
                return
            with load(given | {"quantization": "int8"}) as model:
                yield _compiled("int8 weights", model, request, 1, cost, oracle)
        except AiosError as error:
            yield Rung(f"int8 weights: {error.message}", 0.0)


def _optional(stages: Sequence[Stage], subject: Subject) -> list[str]:
    """Return the optional passes of some stages for the subject's target."""
    infos = [info_of(p) for stage in stages for p in stage.passes]
    target = subject.options.target
    return [i.name for i in infos if not i.required and i.runs_on(target)]


def _cost(subject: Subject, left_out: Collection[str], context: int) -> Cost:
    """Count the program without some passes, with `context` tokens in the cache."""
    module = snapshot.take(subject.captured)
    run_pipeline(module, STAGES, subject.options, disabled=sorted(left_out), verify=0)
    return cost_of(module, context)


def _error(logits: Tensor, oracle: Tensor) -> float:
    scale = float(oracle.abs().max()) or 1.0
    return float((logits.double().reshape(-1) - oracle).abs().max()) / scale


def _eager(source: ModelSource, request: Request, oracle: Tensor) -> Rung:
    model = materialise(source)
    with one_thread():
        begin = time.perf_counter()
        for end in range(request.num_prompt, len(request.ids)):
            logits = run_module(model, torch.tensor(request.ids[: end + 1]), source.flat)[-1]
        rate = request.num_tokens / (time.perf_counter() - begin)
    return Rung("PyTorch eager", rate, error=_error(logits, oracle))


def _last(subject: Subject, module: IRModule, steps: Sequence[Step], dtype: Any) -> Tensor:
    run = run_steps(module, steps, subject.weights, {}, 0, computed_in=dtype, prompt=subject.prompt)
    value = run.outputs[module.outputs[0]]
    return value.reshape(-1, value.shape[-1])[-1].double()


def _captured(subject: Subject, request: Request, oracle: Tensor) -> Rung:
    """Run the captured graph in PyTorch, its operands made before the clock starts."""
    module = subject.captured
    values = inputs.describe(module)
    held = {v.name: subject.weights.weight(module.weights[v.name])
            for v in values if v.kind == "weight"}  # fmt: skip
    runs = []
    for end in range(request.num_prompt + 1, len(request.ids) + 1):
        step = inputs.whole(end)
        given = inputs.runtime_inputs(values, step, 0, vocabulary=2, prompt=request.ids)
        runs.append([
            held[n.name] if n.name in held else given[module.inputs[n.name]]
            for n in placeholders(module.root.graph)
        ])  # fmt: skip
    with one_thread(), torch.no_grad():
        begin = time.perf_counter()
        for operands in runs:
            results = module.root(*operands)
        rate = request.num_tokens / (time.perf_counter() - begin)
    logits = results[0] if isinstance(results, (tuple, list)) else results
    last = logits.reshape(-1, logits.shape[-1])[-1].double()
    return Rung("captured, in PyTorch", rate, error=_error(last, oracle))


def _compiled(
    name: str,
    model: Any,
    request: Request,
    batch: int,
    cost: Cost,
    oracle: Tensor | None = None,
) -> Rung:
    prompts = [list(request.ids[: request.num_prompt])] * batch
    count = max(LEAST_TOKENS, request.num_tokens)  # a few are too quick for the clock
    keywords = {"max_tokens": count, "temperature": 0, "ignore_eos": True}
    best = total_us = 0.0
    while total_us < 1e6 * MEASURED_SECONDS:  # the best: whoever else is busy only slows it down
        results = model.generate(prompts, **keywords)
        first = min(r.metrics.ttft_us for r in results)
        last = max(r.metrics.total_us for r in results)
        total_us += last
        spent = last - first
        best = max(best, 1e6 * batch * (count - 1) / spent)
    error = None
    if oracle is not None:
        error = _error(torch.as_tensor(model(list(request.ids)))[-1], oracle)
    return Rung(name, best, cost.launches, cost.bytes_a_token, error)


def svg(rungs: Sequence[Rung]) -> str:
    """Return bars of the tokens a second, on a scale where ten times is a step."""
    import math
    from html import escape

    rows = [r for r in rungs if r.tokens_per_second > 0]
    low = min(math.log10(r.tokens_per_second) for r in rows) - 0.3
    high = max(math.log10(r.tokens_per_second) for r in rows)
    height, left, width = 30 * len(rows) + 20, 210, 420
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{left + width + 120}' height='{height}' "
        "font-family='sans-serif' font-size='13'>"
    ]
    for i, r in enumerate(rows):
        long = width * (math.log10(r.tokens_per_second) - low) / (high - low)
        y = 10 + 30 * i
        parts.append(f"<text x='{left - 8}' y='{y + 15}' text-anchor='end'>{escape(r.name)}</text>")
        parts.append(f"<rect x='{left}' y='{y}' width='{long:.1f}' height='21' fill='#4878a8'/>")
        label = f"{r.tokens_per_second:,.1f} tokens/s"
        parts.append(f"<text x='{left + long + 6:.1f}' y='{y + 15}'>{label}</text>")
    return "\n".join([*parts, "</svg>", ""])
