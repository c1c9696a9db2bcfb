"""The same request at every stage of the compiler: speed, launches, bytes and error, side by side.

The request is a prompt and given tokens after it, so that every stage computes the same. Stages
before paging compute the whole prefix for each token; afterwards a token is a step. PyTorch runs on
one thread. Launches and bytes are counted from the kernels that the program so far would become
(its optional passes of later stages left out); tokens a second are measured, error is that of the
last logits against float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from aios_compile.config import CompileOptions
from aios_compile.errors import AiosError
from aios_compile.ir import inputs, snapshot
from aios_compile.ir.inputs import Step
from aios_compile.ir.module import IRModule
from aios_compile.model_source import ModelSource
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.measure import one_thread, run_steps
from aios_compile.passes.pipeline import FUSE, RAISE, REWRITE, STAGES
from aios_compile.passes.runner import run_pipeline
from aios_compile.study.ablation import Cost, cost_of
from aios_compile.study.bisect import Subject, open_subject
from aios_compile.study.verify_logits import materialise
from aios_compile.study.verify_logits import run as run_module

BATCH = 8
LEAST_TOKENS = 32  # that a compiled model generates


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
    whole = [Step((0,), (len(request.ids),), (len(request.ids) - 1,), len(request.ids))]
    oracle = _last(subject, subject.captured, whole, torch.float64)
    yield _eager(source, request, oracle)
    yield _graph("captured", subject, subject.captured, request, oracle)
    module = snapshot.take(subject.captured)
    for title, stage in (("+ raise", RAISE), ("+ rewrite (paged)", REWRITE), ("+ fuse", FUSE)):
        run_pipeline(
            module,
            [stage],
            subject.options,
            disabled=_known(options.disable_passes, stage),
            verify=0,
        )
        yield _graph(title, subject, module, request, oracle)
    last = cost_of(module, len(request.ids))
    given = {f.name: getattr(options, f.name) for f in fields(CompileOptions)} | {"progress": False}
    with load(given) as model:
        yield _compiled("C++ kernels", model, request, 1, last, oracle)
        yield _compiled(f"{BATCH} sequences in a batch", model, request, BATCH, last, None)
    if options.quantization is None:
        try:
            with load(given | {"quantization": "int8"}) as model:
                yield _compiled("int8 weights", model, request, 1, None, oracle)
        except AiosError as error:
            yield Rung(f"int8 weights: {error.message}", 0.0)


def _known(names: Sequence[str], stage: Any) -> list[str]:
    return [n for n in names if n in {info_of(p).name for p in stage.passes}]


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


def _graph(name: str, subject: Subject, module: IRModule, request: Request, oracle: Tensor) -> Rung:
    """Run a level of the program in PyTorch."""
    total = len(request.ids)
    paged = "slots" in module.inputs.values()
    begin = time.perf_counter()
    if paged:
        steps = [Step((0,), (request.num_prompt,), (request.num_prompt - 1,), total)]
        singles = range(request.num_prompt, total)
        steps += [Step((at,), (1,), (0,), total) for at in singles]
        logits = _last(subject, module, steps, None)
    else:
        for end in range(request.num_prompt + 1, total + 1):
            logits = _last(subject, module, [inputs.whole(end)], None)
    rate = request.num_tokens / (time.perf_counter() - begin)
    cost = _cost_so_far(subject, name, total)
    counts = (cost.launches, cost.bytes_a_token) if cost else (None, None)
    return Rung(name, rate, counts[0], counts[1], _error(logits, oracle))


_DONE = {"captured": 0, "+ raise": 1, "+ rewrite (paged)": 2, "+ fuse": 3}


def _cost_so_far(subject: Subject, name: str, context: int) -> Cost | None:
    """Count the kernels of the program whose later optional passes are left out."""
    later = STAGES[_DONE[name] :]
    optional = [info_of(p) for stage in later for p in stage.passes if not info_of(p).required]
    target = subject.options.target
    disabled = [info.name for info in optional if info.target in ("", target)]
    module = snapshot.take(subject.captured)
    try:
        run_pipeline(module, STAGES, subject.options, disabled=disabled, verify=0)
    except AiosError:
        return None  # some required pass needs what was left out
    return cost_of(module, context)


def _compiled(
    name: str, model: Any, request: Request, batch: int, cost: Cost | None, oracle: Tensor | None
) -> Rung:
    prompts = [list(request.ids[: request.num_prompt])] * batch
    count = max(LEAST_TOKENS, request.num_tokens)  # a few are too quick for the clock
    keywords = {"max_tokens": count, "temperature": 0, "ignore_eos": True}
    best = 0.0
    for _ in range(3):
        results = model.generate(prompts, **keywords)
        first = min(r.metrics.ttft_us for r in results)
        spent = max(r.metrics.total_us for r in results) - first
        best = max(best, 1e6 * batch * (count - 1) / spent)
    error = None
    if oracle is not None:
        error = _error(torch.as_tensor(model(list(request.ids)))[-1], oracle)
    counts = (cost.launches, cost.bytes_a_token) if cost else (model.program.num_launches, None)
    return Rung(name, best, counts[0], counts[1], error)


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
