"""Choose among kernel candidates for an artefact that has just been written.

Steps are recorded, every candidate is timed in them (runtime/select_kernels.py), and the ledger is
kept in the artefact. The engine makes the steps, so they are the ones that requests will make.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aios_compile import env
from aios_compile.codegen.artefact import Artefact
from aios_compile.codegen.cpp import build
from aios_compile.codegen.kernel_choices import FILE, KernelChoices
from aios_compile.codegen.manifest import canonical
from aios_compile.codegen.private_folder import cache_errors
from aios_compile.codegen.program import Program
from aios_compile.config import CompileOptions
from aios_compile.engine_sizes import make_limits, make_scheduler_options
from aios_compile.gpu_kernel_selection import choose_on_gpu
from aios_compile.progress import Progress
from aios_compile.runtime.batch import Batch, Limits, StepResult
from aios_compile.runtime.engine import Engine
from aios_compile.runtime.executor import CpuExecutor
from aios_compile.runtime.program_runner import ProgramRunner
from aios_compile.runtime.select_kernels import Step, select_kernels
from aios_compile.runtime.weight_memory import WeightMemory, free_memory_bytes
from aios_compile.sampling_params import SamplingParams

# Tokens: decode of one sequence, which is bound by bytes, and all that is longer, which is bound by
# arithmetic too: its tiles want their prefetches, and nothing is left to choose.
BUCKETS = (1, 8)


def choose_kernels(folder: Path, options: CompileOptions, progress: Progress) -> None:
    """Write kernel_choices.json into an artefact's folder, if its program leaves a choice.

    Nothing is written with AIOS_SELECT_KERNELS=0, or when PyTorch runs the model.
    """
    seconds = env.SELECT_KERNELS.get_int(0, 3600)
    if not seconds or env.EAGER.get_int(0, 1):
        return
    artefact = Artefact.unsealed(folder)
    program = Program.from_json(artefact.program)
    if not any(kernel.candidates for kernel in program.kernels):
        return
    with progress.stage("select kernels"):
        if program.settings.get("family") == "triton":
            choices = choose_on_gpu(artefact, program, options, seconds)
            artefact.close()
        else:
            choices = _choose_on_cpu(artefact, program, options, seconds)
        for line in choices.lines():
            progress.note(line)
    with cache_errors(folder):
        (folder / FILE).write_bytes(canonical(choices.to_json()))


def _choose_on_cpu(
    artefact: Artefact, program: Program, options: CompileOptions, seconds: float
) -> KernelChoices:
    limits = _small_pool(make_limits(program, options, free := free_memory_bytes()))
    library = build.load(artefact.library)
    memory = WeightMemory(artefact, program, free)
    memory.finish()  # they are timed where they will lie
    runner = ProgramRunner(
        program,
        library,
        memory.arrays,
        options.threads(),
        num_pages=limits.num_pages,
        page_table_width=limits.max_pages_per_sequence,
    )
    try:
        steps = _recorded(runner, program, options, limits)
        return select_kernels(runner, steps, seconds, huge_pages=memory.in_huge_pages)
    finally:
        runner.close()
        memory.close()
        artefact.close()
        build.unload(library)


def _small_pool(limits: Limits) -> Limits:
    pages = -(-(BUCKETS[-1] + 2) // limits.page_size) + 2
    return replace(limits, num_pages=min(limits.num_pages, pages))


class _Recorder(CpuExecutor):
    """Runs steps and keeps the inputs of each kind once."""

    def __init__(self, runner: ProgramRunner, limits: Limits) -> None:
        super().__init__(runner, limits)
        self.steps: dict[int, Step] = {}

    def step(self, batch: Batch) -> StepResult:
        inputs: dict[str, Any] = {name: np.array(value) for name, value in vars(batch).items()}
        sizes = batch.num_tokens, batch.num_sequences, batch.num_rows
        self.steps.setdefault(batch.num_tokens, Step(inputs, *sizes))
        return super().step(batch)

    def close(self) -> None:
        """The runner is not ours."""


def _recorded(
    runner: ProgramRunner, program: Program, options: CompileOptions, limits: Limits
) -> list[Step]:
    recorder = _Recorder(runner, limits)
    engine = Engine(
        recorder,
        None,
        eos_token_ids=program.settings["eos_token_ids"],
        defaults=SamplingParams.defaults_from({}),
        seed=0,
        why_not=program.settings.get("why_not", ""),
        options=make_scheduler_options(program, options, limits, can_swap=False),
    )
    longest = min(limits.max_num_batched_tokens, limits.capacity_tokens - 1)
    for i, tokens in enumerate(sorted({min(tokens, longest) for tokens in BUCKETS})):
        prompt = [i] * tokens  # another token each: no prefix is found in the cache
        if program.settings.get("generatable", True):
            params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
            engine.generate([prompt], params)
        else:
            engine.logits(prompt)
    engine.close()
    return [recorder.steps[tokens] for tokens in sorted(recorder.steps)]
