# ruff: noqa: F722, F821, UP037
"""Programs on which the mistakes are shown: captured tiny models, and small traced functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule
from aios_compile.ir.stored_weights import bind_stored_weights
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import PassFunction, info_of
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.runner import Stage, run_pipeline
from tests.passes.helpers import captured, captured_module, trace
from tests.passes.test_rewrite_hits import foreign


def strided(x: "f32[T, 64]", w: "weight f32[128, 32]") -> Any:
    return torch.ops.aios.linear(torch.relu(x)[:, ::2], w, None)


def parts(x: "f32[T, 64]") -> Any:
    y = torch.relu(x)
    return y[:, 32:], x


def experts(x: "f32[T, 48]", w: "weight f32[4, 80, 48]") -> Any:
    chosen = torch.topk(x[:, :4], 1).indices[:, 0]
    return torch.bmm(w[chosen], x[:, :, None]).squeeze(-1)


def stored(x: "f32[T, 64]", gate: "weight f32[64, 64]", up: "weight f32[64, 64]") -> Any:
    aios = torch.ops.aios
    return aios.linear(x, gate, None), aios.linear(x, up, None)


def _stored() -> IRModule:
    module = _traced(stored)
    bind_stored_weights(module, dict.fromkeys(("gate", "up"), "int8_g32_f16"))
    module.outputs = ("gate", "up")
    return module


def _traced(function: Callable[..., Any]) -> IRModule:
    module = trace(function)
    for node in module.root.graph.nodes:
        node.meta["source_lines"] = (f"programs.py:1 in {function.__name__}",)
    return module


def _foreign(name: str) -> IRModule:
    torch.manual_seed(0)
    return captured_module(foreign(name), flat=False)


DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 12}
PROGRAMS: dict[str, Callable[[], IRModule]] = {
    "qwen3": lambda: captured("qwen3"),
    "qwen2": lambda: captured("qwen2"),
    "half": lambda: captured("qwen3", torch.bfloat16),
    "window": lambda: captured("mistral", sliding_window=9),
    "wide_window": lambda: captured("mistral", sliding_window=48),
    "huge_window": lambda: captured("mistral", sliding_window=512, max_position_embeddings=1024),
    "dynamic": lambda: captured("llama", **DYNAMIC),
    "layer_norm": lambda: _foreign("neox"),
    "gemma2": lambda: _foreign("gemma2"),
    "quantised": lambda: captured("qwen3"),
    "triton": lambda: captured("qwen3"),
    "rounded": lambda: captured("qwen3", torch.bfloat16),
    "int8_kv": lambda: captured("mistral", sliding_window=9),
    "e4m3_kv": lambda: snapshot.take(level_1("int8_kv")),
    "experts": lambda: _traced(experts),
    "stored": _stored,
    "strided": lambda: _traced(strided),
    "parts": lambda: _traced(parts),
}


OPTIONS = {
    "quantised": PassOptions(quantization="int8_g32_f16"),
    "triton": PassOptions(target="triton"),
    "rounded": PassOptions(bf16_dot=True),
    "int8_kv": PassOptions(quantize_kv="int8"),
    "e4m3_kv": PassOptions(quantize_kv="e4m3"),
}


def options_of(name: str) -> PassOptions:
    """Return the options that a program is compiled with."""
    return OPTIONS.get(name, PassOptions())


@functools.cache
def level_1(name: str) -> IRModule:
    return PROGRAMS[name]()


@functools.cache
def _before(name: str, pass_name: str) -> IRModule:
    module = snapshot.take(level_1(name))
    for stage in STAGES:
        kept = []
        for function in stage.passes:
            if info_of(function).name == pass_name:
                run_pipeline(module, [Stage(module.level, tuple(kept))], options_of(name), verify=0)
                return module
            kept.append(function)
        run_pipeline(
            module,
            [Stage(stage.level_after, tuple(kept), stage.analysis)],
            options_of(name),
            verify=0,
        )
    raise AssertionError(f"no pass {pass_name}")


def before(name: str, pass_name: str) -> IRModule:
    """Return a program as the pipeline hands it to a pass."""
    return snapshot.take(_before(name, pass_name))


def pass_named(name: str) -> PassFunction:
    """Return a pass of the pipeline."""
    return next(p for stage in STAGES for p in stage.passes if info_of(p).name == name)
