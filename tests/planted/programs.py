# ruff: noqa: F722, F821, UP037
"""Programs on which the mistakes are shown: captured tiny models, and small traced functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule
from aios_compile.ir.stored_weights import bind_stored_weights
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import PassFunction, info_of
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.result import PassResult
from aios_compile.passes.runner import Stage, run_pipeline
from tests.passes.helpers import captured, trace
from tests.passes.test_rewrite_hits import captured_foreign


def strided(x: "f32[T, 64]", w: "weight f32[128, 32]") -> Any:
    return torch.ops.aios.linear(torch.relu(x)[:, ::2], w, None)


def parts(x: "f32[T, 64]") -> Any:
    y = torch.relu(x)
    return y[:, 32:], x


def counted(x: "f32[T, 16]", table: "weight f32[64, 16]") -> Any:
    tokens = x.shape[0]
    return x * table[:tokens] * torch.arange(1, tokens + 1)[:, None]


def two_results(x: "f32[T, 64]", w: "weight f32[64, 64]") -> Any:
    y = torch.relu(x.mm(w.t()))
    return y, torch.tanh(y)


def _two_results() -> IRModule:
    module = _traced(two_results)
    module.outputs = ("first", "second")
    return module


def experts(x: "f32[T, 48]", w: "weight f32[4, 80, 48]") -> Any:
    chosen = torch.topk(x[:, :4], 1).indices[:, 0]
    return torch.bmm(w[chosen], x[:, :, None]).squeeze(-1)


def mixture(x: "f32[T, 64]", up: "weight f32[4, 32, 64]", down: "weight f32[4, 64, 32]") -> Any:
    chosen = torch.topk(x[:, :4], 1).indices[:, 0]
    aios = torch.ops.aios
    return aios.expert_linear(aios.expert_linear(x, up, chosen), down, chosen)


def stored(x: "f32[T, 64]", gate: "weight f32[64, 64]", up: "weight f32[64, 64]") -> Any:
    aios = torch.ops.aios
    return aios.linear(x, gate, None), aios.linear(x, up, None)


def _stored() -> IRModule:
    module = _traced(stored)
    bind_stored_weights(module, dict.fromkeys(("gate", "up"), "int8_g32_f16"))
    module.outputs = ("gate", "up")
    return module


def _ordered() -> IRModule:
    """As stored, both matrices with columns in orders of their own."""
    module = _traced(stored)
    bind_stored_weights(
        module, dict.fromkeys(("gate", "up"), "int8_g32_f16"), {"gate": "gate", "up": "up"}
    )
    module.outputs = ("gate", "up")
    return module


def _traced(function: Callable[..., Any]) -> IRModule:
    module = trace(function)
    for node in module.root.graph.nodes:
        node.meta["source_lines"] = (f"programs.py:1 in {function.__name__}",)
    return module


DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 12}
FAR = {**DYNAMIC, "max_position_embeddings": 4096}
PROGRAMS: dict[str, Callable[[], IRModule]] = {
    "qwen3": lambda: captured("qwen3"),
    "qwen2": lambda: captured("qwen2"),
    "layers": lambda: captured("qwen2", num_hidden_layers=6),
    "wide": lambda: captured("qwen3", hidden_size=512, head_dim=64),
    "half": lambda: captured("qwen3", torch.bfloat16),
    "window": lambda: captured("mistral", sliding_window=9),
    "wide_window": lambda: captured("mistral", sliding_window=48),
    "huge_window": lambda: captured("mistral", sliding_window=512, max_position_embeddings=1024),
    "dynamic": lambda: captured("llama", **DYNAMIC),
    "far": lambda: captured("llama", **FAR),
    "vocabulary": lambda: captured("qwen3", vocab_size=160),
    "not_rounded": lambda: captured("qwen3"),
    "layer_norm": lambda: captured_foreign("neox"),
    "gemma2": lambda: captured_foreign("gemma2"),
    "quantised": lambda: captured("qwen3"),
    "triton": lambda: captured("qwen3"),
    "rounded": lambda: captured("qwen3", torch.bfloat16),
    "int8_kv": lambda: captured("mistral", sliding_window=9),
    "e4m3_kv": lambda: snapshot.take(level_1("int8_kv")),
    "experts": lambda: _traced(experts),
    "mixture": lambda: _traced(mixture),
    "stored": _stored,
    "ordered": _ordered,
    "strided": lambda: _traced(strided),
    "parts": lambda: _traced(parts),
    "counted": lambda: _traced(counted),
    "two_results": _two_results,
}


OPTIONS = {
    "quantised": PassOptions(quantization="int8_g32_f16"),
    "mixture": PassOptions(quantization="int8_g32_f16"),
    "triton": PassOptions(target="triton"),
    "rounded": PassOptions(bf16_dot=True),
    "not_rounded": PassOptions(bf16_dot=True),
    "int8_kv": PassOptions(quantize_kv="int8"),
    "e4m3_kv": PassOptions(quantize_kv="e4m3"),
}


def options_of(name: str) -> PassOptions:
    """Return the options that a program is compiled with."""
    return OPTIONS.get(name, PassOptions())


@functools.cache
def level_1(name: str) -> IRModule:
    return PROGRAMS[name]()


class Reached(NamedTuple):
    """A program before the pass of a number, and what the passes of its stage said so far."""

    number: int
    module: IRModule
    results: tuple[PassResult, ...] = ()


_REACHED: dict[str, list[Reached]] = {}


def before(name: str, pass_name: str) -> IRModule:
    """Return a program as the pipeline hands it to a pass.

    Goes on from the last pass before it that was asked for in this process.
    """
    names = [info_of(p).name for stage in STAGES for p in stage.passes]
    wanted = names.index(pass_name)
    known = _REACHED.setdefault(name, [Reached(0, level_1(name))])
    last = max((r for r in known if r.number <= wanted), key=lambda r: r.number)
    if last.number < wanted:
        last = _advanced(last, wanted, options_of(name))
        known.append(last)
    return snapshot.take(last.module)


def _advanced(start: Reached, wanted: int, options: PassOptions) -> Reached:
    module, results, end = snapshot.take(start.module), start.results, 0
    for stage in STAGES:
        begin, end = end, end + len(stage.passes)
        passes = stage.passes[max(start.number - begin, 0) : max(wanted - begin, 0)]
        if end <= start.number or not passes:
            continue
        results += tuple(run_pipeline(module, [Stage(module.level, passes)], options, verify=0))
        if end <= wanted:  # the whole stage
            if stage.analysis is not None:
                stage.analysis(module, results)
            module.level, results = stage.level_after, ()
    return Reached(wanted, module, results)


def pass_named(name: str) -> PassFunction:
    """Return a pass of the pipeline."""
    return next(p for stage in STAGES for p in stage.passes if info_of(p).name == name)
