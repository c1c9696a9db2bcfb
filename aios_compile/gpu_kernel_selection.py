"""select_kernels on a GPU, for an artefact just written: an engine's steps, and what to time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from aios_compile.codegen.artefact import KERNELS, Artefact
from aios_compile.codegen.kernel_choices import KernelChoices
from aios_compile.codegen.program import Program
from aios_compile.codegen.triton.configs import PREFILL_TOKENS
from aios_compile.config import CompileOptions
from aios_compile.engine_sizes import make_limits
from aios_compile.errors import EngineError
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.example_steps import equal_sequences, pages_of
from aios_compile.runtime.gpu_executor import GpuExecutor, token_buckets
from aios_compile.runtime.select_gpu_kernels import DeviceStep, TimedStep, select_on_device
from aios_compile.runtime.torch_device import open_device

CONTEXT = 1024  # tokens of each sequence of a decode step that is timed
# A step for each range of rows that kernels distinguish, as long as the range goes.
TOKENS = (1, 4, 16, 32, 64, PREFILL_TOKENS)


def choose_on_gpu(
    artefact: Artefact, program: Program, options: CompileOptions, seconds: float
) -> KernelChoices:
    """Return what the clock chose; nothing, with a note, where the device has no room for it."""
    device = open_device(options.device)
    executor = None
    try:
        device.use_binaries(artefact.path)
        folder = artefact.path / KERNELS
        executor = GpuExecutor(
            program,
            [device.load(folder / f"{kernel.name}.py") for kernel in program.kernels],
            {w.name: artefact.tensor(w.name) for w in program.weights},
            small_limits(make_limits(program, options, 1 << 40)),
            device,
            captures=False,
        )
        return select_on_device(timed_steps(executor), seconds).choices
    except EngineError as error:
        return KernelChoices(notes=(f"nothing was timed: {error}",))
    finally:
        if executor is not None:
            executor.close()  # and the device
        else:
            device.close()


def small_limits(limits: Limits) -> Limits:
    """Return the limits with as many pages as the timed steps need."""
    buckets = token_buckets(limits.max_num_batched_tokens)
    shapes = _shapes(limits)
    pages = max(pages_of(limits, *shape) for shape in (*shapes, (1, shapes[0][1], shapes[0][1])))
    return replace(limits, num_pages=max(2, pages), token_buckets=buckets, unfolds=True)


def _shapes(limits: Limits) -> list[tuple[int, int, int]]:
    """Return (sequences, context, new tokens) of each step: decode while there are sequences."""
    longest = min(limits.max_model_len, limits.max_pages_per_sequence * limits.page_size)
    found, context = [], min(CONTEXT, longest)
    for tokens in sorted({min(tokens, limits.max_num_batched_tokens) for tokens in TOKENS}):
        decodes = tokens <= min(limits.max_num_seqs, limits.max_num_logit_rows)
        new = min(tokens, longest)
        found.append((tokens, context, 1) if decodes else (1, new, new))
    return found


def timed_steps(executor: GpuExecutor) -> Sequence[Callable[[], TimedStep]]:
    """Return the steps to time, ascending; the cache is filled with what a prompt leaves there."""
    limits = executor.limits
    shapes = _shapes(limits)
    context, most = shapes[0][1], limits.max_num_batched_tokens
    for begin in range(0, context, most):
        new = min(most, context - begin)
        executor.step(equal_sequences(limits, 1, begin + new, new, seed=begin))
    batches = [equal_sequences(limits, *shape) for shape in shapes]
    return [partial(DeviceStep, executor, batch) for batch in batches]
