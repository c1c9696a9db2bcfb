"""A model that is ready to use: generate, stream, logits, report, dump.

It owns the engine, the executor behind it, the mapped artefact and the cache's use lock. torch is
imported only when the model is called with, or returns, tensors.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_compile.checkpoint.tokenizer import Tokenizer
from aios_compile.codegen.artefact import KERNELS, Artefact
from aios_compile.codegen.cpp import build
from aios_compile.codegen.kernel_choices import NO_CHOICES
from aios_compile.codegen.program import MemoryPlan
from aios_compile.config import CompileOptions
from aios_compile.engine_sizes import make_limits, make_scheduler_options
from aios_compile.errors import ConfigError, RequestError
from aios_compile.progress import Progress
from aios_compile.runtime.batch import Executor, Limits
from aios_compile.runtime.device import Device
from aios_compile.runtime.draft_governor import DraftGovernor
from aios_compile.runtime.draft_model import DraftModel
from aios_compile.runtime.engine import Engine, TextStream
from aios_compile.runtime.executor import CpuExecutor
from aios_compile.runtime.gpu_executor import GpuExecutor, token_buckets
from aios_compile.runtime.gpu_memory import CardPlan, compare, plan_card
from aios_compile.runtime.outputs import RequestOutput
from aios_compile.runtime.program_runner import ProgramRunner
from aios_compile.runtime.prompt_lookup import PromptLookup
from aios_compile.runtime.speculator import Proposer, Speculator
from aios_compile.runtime.torch_device import open_device
from aios_compile.runtime.weight_memory import OpenArtefact
from aios_compile.sampling_params import SamplingDefaults, SamplingParams
from aios_compile.study.report import Report

if TYPE_CHECKING:
    import torch

MakeExecutor = Callable[[Limits], Executor]
logger = logging.getLogger(__name__)
# A step that reads more than this is bound by memory: all threads, and a quicker start. Judged by
# the bytes and not by the time, which a busy machine stretches.
LARGE_MODEL_BYTES = 256 << 20
WARM_UP_SECONDS = 0.02


class CompiledModel:
    """See interfaces: generate, stream, __call__, report, dump, memory_plan, close.

    make_executor: runs the steps instead of the artefact's kernels (AIOS_EAGER). draft: proposes
    tokens for speculation; nobody else may run it from now on.
    """

    def __init__(
        self,
        path: Path,
        options: CompileOptions,
        progress: Progress,
        make_executor: MakeExecutor | None = None,
        draft: CompiledModel | None = None,
    ) -> None:
        self.artefact_path = path
        self.options = options
        self.progress = progress
        self._closing = ExitStack()
        try:
            with progress.stage("load"):
                self._opened = OpenArtefact.of(path, reads=make_executor is None)
                self._closing.callback(self._opened.close)  # last: what it holds is used by all
                self._load(make_executor, draft)
        except BaseException:
            with suppress(BufferError):  # the error's frames may hold arrays of the weights
                self._closing.close()
            raise

    def _load(self, make_executor: MakeExecutor | None, draft: CompiledModel | None) -> None:
        self._artefact, self.program = self._opened.artefact, self._opened.program
        self.limits = make_limits(self.program, self.options, self._opened.free_bytes)
        self.runner: ProgramRunner | None = None
        triton = self.program.settings.get("family") == "triton"
        self.scheduler_options = make_scheduler_options(
            self.program, self.options, self.limits, can_swap=make_executor is None
        )
        self.tokenizer = _load_tokenizer(self._artefact)
        executor = (make_executor or (self._gpu if triton else self._kernels))(self.limits)
        self._closing.callback(executor.close)  # again, and should the engine not start
        settings, log = self.program.settings, self.options.decision_log
        self.engine = Engine(
            executor,
            self.tokenizer,
            eos_token_ids=settings["eos_token_ids"],
            defaults=SamplingParams.defaults_from(settings["generation_config"]),
            seed=self.options.seed,
            why_not=settings.get("why_not", ""),
            options=self.scheduler_options,
            decision_sink=None if log is None else Path(log),
            speculator=make_speculator(self.options, self.limits, draft),
        )

    def _kernels(self, limits: Limits) -> Executor:
        library = build.load(self._artefact.library)
        self._closing.callback(build.unload, library)
        memory = self._opened.memory
        assert memory is not None, "the artefact was opened without its weights"
        choices = self._artefact.kernel_choices
        self.runner = ProgramRunner(
            self.program,
            library,
            memory.arrays,
            self.options.threads(),
            num_pages=limits.num_pages,
            page_table_width=limits.max_pages_per_sequence,
            num_host_pages=self.scheduler_options.num_host_pages,
            choices=choices if choices.huge_pages == memory.in_huge_pages else NO_CHOICES,
        )
        return CpuExecutor(self.runner, limits)

    def _gpu(self, limits: Limits) -> Executor:
        """Return the executor of the Triton target, its graphs captured for every bucket."""
        device = open_device(self.options.device)
        buckets = token_buckets(limits.max_num_batched_tokens)
        limits = replace(limits, token_buckets=buckets, unfolds=True)
        memory = device.memory()
        if memory is not None:
            free, total = memory
            asked = None if self.options.kv_cache_memory_bytes is None else limits.num_pages
            share = self.options.gpu_memory_utilization
            plan = plan_card(self.program, limits, buckets, total, free, share, asked)
            self.progress.note("GPU memory\n" + plan.table())
            limits = replace(limits, num_pages=plan.num_pages)
        self.limits = limits
        self.scheduler_options = make_scheduler_options(  # of the pages that the card has
            self.program, self.options, limits, can_swap=True
        )
        kernels = self.artefact_path / KERNELS
        device.use_binaries(self.artefact_path)
        executor = GpuExecutor(
            self.program,
            [device.load(kernels / f"{kernel.name}.py") for kernel in self.program.kernels],
            {w.name: self._artefact.tensor(w.name) for w in self.program.weights},
            limits,
            device,
            num_host_pages=self.scheduler_options.num_host_pages,
            choices=self._artefact.kernel_choices,
        )
        if memory is not None:  # the interpreter has nothing to compile, and is slow
            with self.progress.stage("capture graphs"):
                executor.capture()
            self._settle(device, plan, memory[0])
        return executor

    def _settle(self, device: Device, plan: CardPlan, free_before: int) -> None:
        """Hold the card's memory to the plan, and keep the garbage collector from what is there.

        Its walk over torch's and the model's objects would stop the host for longer than many steps
        take, and the GPU with it. They are given back when the model is closed.
        """
        found = device.memory()
        assert found is not None, "a card has memory"
        line, fits = compare(plan, free_before, found[0])
        self.progress.note(line)
        if not fits:
            logger.warning("%s: lower gpu_memory_utilization", line)
        gc.collect()
        gc.freeze()
        self._closing.callback(gc.unfreeze)

    @property
    def memory_plan(self) -> MemoryPlan:
        """Return the arena: .arena_bytes .naive_bytes .lower_bound_bytes .buffers."""
        return self.program.plan

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """Return the sampling defaults and where each comes from."""
        return self.engine.defaults

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **fields: Any,
    ) -> Any:
        """Generate for one prompt (text or token ids) or a list; return one result or a list.

        fields: those of SamplingParams. Raises RequestError before anything runs.
        """
        single = is_one_prompt(prompts)
        batch: list[Any] = [prompts] if single else list(prompts)
        results: list[RequestOutput] = self.engine.generate(batch, sampling_params, **fields)
        return results[0] if single else results

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        **fields: Any,
    ) -> TextStream:
        """Yield chunks whose .text is what came since the last, never half a character."""
        return self.engine.stream(prompt, sampling_params, **fields)

    def __call__(self, input_ids: Any, positions: Any = None) -> torch.Tensor:
        """Return float32 logits [T, vocab] of one sequence of token ids [T] from position 0."""
        import torch

        ids = as_ids(input_ids, "input_ids")
        if positions is not None:
            expected = torch.arange(len(ids))
            if not torch.equal(as_ids(positions, "positions").cpu().long(), expected):
                raise ConfigError("positions must be 0, 1, ... T-1: one sequence from its begin")
        return torch.from_numpy(self.engine.logits(ids.tolist()))

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt text of a conversation."""
        if self.tokenizer is None:
            raise ConfigError("the model has no tokenizer", advice="pass tokenizer=folder")
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt
        )

    def report(self) -> Report:
        """Return the pass table with certificates, and the notes of this compile and of its use."""
        report = Report.from_json(self._artefact.report)
        lines = [*self._artefact.kernel_choices.lines()]
        if self._opened.memory is not None and (line := self._opened.memory.line()):
            lines.append(line)
        if self.engine.speculation is not None:
            lines.append(f"speculation: {self.engine.speculation}")
        return replace(report, notes=(*report.notes, *lines))

    def dump(self, folder: str | os.PathLike[str]) -> Path:
        """Write every level, kernel, the plan and certificates to a folder; return its index."""
        from aios_compile.study.dump import dump_artefact

        return dump_artefact(self.artefact_path, Path(folder))

    def warm_up(self) -> None:
        """Run a few steps, so that the first request finds everything in place; choose threads.

        Without the option num_threads, one thread is kept where all of them measure slower. Of a
        large model on a CPU none is run: it takes as long as the first token, which it would delay.
        Large weights begin to move to huge pages after it.
        """
        self._choose_threads()
        if self._opened.memory is not None:
            self._opened.memory.begin()

    def _choose_threads(self) -> None:
        runner = self.runner
        large = sum(t.num_bytes for t in self._artefact.tensors.values()) > LARGE_MODEL_BYTES
        if runner is None or not large:
            self._time_step()
        if runner is None or self.options.num_threads is not None or runner.num_threads == 1:
            return
        every = runner.num_threads
        if large:
            self.progress.note(f"{every} threads: the model is large")
            return
        slow = self._time_step()
        runner.set_num_threads(1)
        one = self._time_step()
        if one > slow:
            runner.set_num_threads(every)
        self.progress.note(
            f"{runner.num_threads} of {every} threads: a step takes {slow:.0f} us with {every}, "
            f"{one:.0f} us with one"
        )

    def _time_step(self) -> float:
        """Return the microseconds of a decode step: the quickest of WARM_UP_SECONDS."""
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
        generates = self.program.settings.get("generatable", True)
        stats = self.engine.stats
        best, end = float("inf"), time.perf_counter() + WARM_UP_SECONDS
        while True:
            steps, executor_us = stats.num_steps, stats.executor_us
            if generates:
                self.engine.generate([[0]], params)  # a prompt of one token is a decode step too
            else:
                self.engine.logits([0])
            best = min(best, (stats.executor_us - executor_us) / (stats.num_steps - steps))
            if time.perf_counter() > end:
                return best

    def close(self) -> None:
        """Free threads, memory and locks; idempotent. Requests that run get EngineClosedError."""
        self.engine.close()
        self._closing.close()

    def on_close(self, function: Any, *args: Any) -> None:
        """Run `function` when the model is closed (release the cache entry, remove a folder)."""
        self._closing.callback(function, *args)

    def __enter__(self) -> CompiledModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def is_one_prompt(prompts: Any) -> bool:
    """Return whether prompts is one text or one list of token ids."""
    if isinstance(prompts, str):
        return True
    try:
        return bool(len(prompts)) and not isinstance(prompts[0], (str, list, tuple))
    except (TypeError, LookupError):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}, expected text, token ids or a list of those"
        ) from None


def as_ids(value: Any, name: str) -> torch.Tensor:
    """Return whole numbers as a tensor. Raises ConfigError for anything else."""
    import torch

    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name} is a {type(value).__name__}, expected integers [T]") from None
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex():
        raise ConfigError(f"{name} has shape {tuple(ids.shape)}, expected integers [T]")
    return ids


def make_speculator(
    options: CompileOptions, limits: Limits, draft: CompiledModel | None
) -> Speculator | None:
    """Return what proposes drafts, if speculative_config asks for it."""
    config = options.speculation
    if config is None:
        return None
    proposer: Proposer = PromptLookup(config.prompt_lookup_min, config.prompt_lookup_max)
    if draft is not None:
        if draft.limits.vocab_size != limits.vocab_size:
            raise ConfigError(
                f"speculative_config: {config.model} has {draft.limits.vocab_size} tokens in its "
                f"vocabulary, expected the target's {limits.vocab_size}"
            )
        proposer = DraftModel(draft.engine.executor)
    most = config.num_speculative_tokens
    return Speculator(proposer, most, limits, DraftGovernor(most) if config.adaptive else None)


def _load_tokenizer(artefact: Artefact) -> Tokenizer | None:
    if not (artefact.tokenizer / "tokenizer.json").exists():
        return None
    return Tokenizer.load(artefact.tokenizer)
