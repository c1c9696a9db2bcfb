"""Compile up to the plan and no further: no weight is read, nothing is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aios_compile.codegen.cpp.build import Target
from aios_compile.codegen.emit_kernels import Emitted
from aios_compile.codegen.program import Program
from aios_compile.codegen.targets import emit, lower_for
from aios_compile.compile_settings import (
    capture_for,
    limits_of,
    pass_options,
    settings_of,
    within,
)
from aios_compile.config import CompileOptions, ResolvedSizes
from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule
from aios_compile.ir.refresh import refresh
from aios_compile.kernel_tuning import tuning_for
from aios_compile.model_source import ModelSource, max_model_len, open_source
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.plan_memory import plan_memory
from aios_compile.passes.result import PassResult
from aios_compile.passes.runner import Stage, run_pipeline

WEIGHTS = ("*.safetensors", "*.gguf", "*.safetensors.index.json")


@dataclass(frozen=True)
class Planned:
    """A program before it is built: level 1, level 3, what the passes did, kernels and plan."""

    captured: IRModule
    module: IRModule
    results: tuple[PassResult, ...]
    emitted: Emitted
    program: Program

    def with_tokens(self, num_tokens: int) -> Program:
        """Plan the same kernels for another number of tokens a step."""
        sizes = {**self.program.sizes, "T": num_tokens}
        if self.module.not_generatable:
            sizes["R"] = num_tokens
        return lower_for(self.module, self.emitted, sizes, self.program.settings, plan_memory)


def plan_model(
    source: ModelSource,
    options: CompileOptions,
    *,
    verify: int = 0,
    stages: Sequence[Stage] = STAGES,
    disabled: Sequence[str] = (),
    card: str = "",
    cpu: Target | None = None,
    tuning: Any = None,
) -> Planned:
    """Capture, run the passes, emit and plan. verify: 1 proves each pass on random weights.

    card: with device="cuda", the GPU that the kernels are made for ("cuda:90"); none is needed.
    cpu: with device="cpu", the instruction set instead of the host's. tuning: whom to ask about a
    GPU's configurations (codegen.triton.choice.Tuning), if not the compiler as the options say.
    """
    rewritten = rewrite_model(
        source, options, verify=verify, stages=stages, disabled=disabled, cpu=cpu
    )
    return rewritten.planned_for(card, tuning)


@dataclass(frozen=True)
class Rewritten:
    """Levels 1 and 3 of a model and what the passes did: the same for every GPU."""

    captured: IRModule
    module: IRModule
    results: tuple[PassResult, ...]
    source: ModelSource
    options: CompileOptions
    sizes: ResolvedSizes
    cpu: Target | None = None

    def planned_for(self, card: str = "", tuning: Any = None) -> Planned:
        """Emit the kernels for a card (or for the options' device) and plan the memory."""
        module, options = self.module, self.options
        joined, tuning = options.joined_launches(), tuning or tuning_for(options, card)
        emitted = emit(module, options.device, card=card, joined=joined, tuning=tuning)
        sizes = replace(self.sizes, max_num_seqs=1) if module.not_generatable else self.sizes
        settings = settings_of(self.source, module, sizes, card, joined)
        settings |= {"target": self.cpu.name} if self.cpu is not None else {}
        program = lower_for(module, emitted, limits_of(module, sizes), settings, plan_memory)
        return Planned(self.captured, module, self.results, emitted, program)


def rewrite_model(
    source: ModelSource,
    options: CompileOptions,
    *,
    verify: int = 0,
    stages: Sequence[Stage] = STAGES,
    disabled: Sequence[str] = (),
    cpu: Target | None = None,
) -> Rewritten:
    """Capture a model and run the passes: plan_model before it emits for a card."""
    sizes = options.resolve_sizes(source.max_model_len)
    model = source.build()
    captured = capture_for(model, source, sizes)
    sizes = within(captured, sizes, options)
    module = snapshot.take(captured)
    results = run_pipeline(
        module,
        stages,
        pass_options(options, sizes, model, cpu=cpu),
        disabled=(*options.disable_passes, *disabled),
        verify=verify,
        seed=options.seed,
    )
    refresh(module)
    return Rewritten(captured, module, tuple(results), source, options, sizes, cpu)


def open_without_weights(model: str | Path | nn.Module, options: CompileOptions) -> ModelSource:
    """Open a model of which a config.json is enough: a folder, that file, or any usual source.

    The source's `read` raises; its parameters have no memory. An nn.Module is taken as it is.
    """
    if isinstance(model, nn.Module):
        return open_source(model, options)
    path = Path(model)
    config = path if path.suffix == ".json" else path / "config.json"
    alone = path.suffix == ".json" or not any(any(path.glob(p)) for p in WEIGHTS)
    return (
        _source_of(config, options) if config.is_file() and alone else open_source(model, options)
    )


def _source_of(path: Path, options: CompileOptions) -> ModelSource:
    from aios_compile.checkpoint.json_file import read_json
    from aios_compile.models.config import ModelConfig
    from aios_compile.models.decoder import Decoder
    from aios_compile.models.fake import build_fake

    config = ModelConfig.from_dict(read_json(path), str(path))
    dtype = config.dtype or "bfloat16" if options.dtype == "auto" else options.dtype

    def build() -> nn.Module:
        return build_fake(lambda: Decoder(config), getattr(torch, dtype))

    def read(name: str) -> torch.Tensor:
        raise KeyError(name)

    return ModelSource(
        name=str(path),
        build=build,
        read=read,
        flat=True,
        max_model_len=max_model_len(config),
        model_eos_ids=tuple(config.eos_token_ids),
    )
