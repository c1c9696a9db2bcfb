"""The Executor of the Triton target: one launch list, captured as a graph for each token bucket.

A step is one copy of a packet to the device, one launch of the bucket's graph, and one copy of the
sampled rows back; waiting for that copy is the only wait (gpu_step.py), and `begin` leaves even
that to whoever wants the result: the next step, whose ids the first one samples, can be asked for
before. All that differs from step to step (lengths, pages, slots, sampling) is made on the device
from the packet, by the first kernel of the graph; grids and scalars depend on the bucket alone.
Weights, KV pages, arena and counters are allocated once; a step allocates nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile import env
from aios_compile.codegen.kernel_choices import NO_CHOICES, STANDARD, KernelChoices
from aios_compile.codegen.program import Program
from aios_compile.codegen.step_results import SAMPLED
from aios_compile.errors import EngineClosedError, EngineError
from aios_compile.runtime.batch import NO_LOGITS, Batch, Ints, Limits, StepResult
from aios_compile.runtime.device import Bytes, Device, Graph, Memory
from aios_compile.runtime.gpu_step import GpuStep, LazyResult, StepSide
from aios_compile.runtime.launch_list import Call, Place, launch_list
from aios_compile.runtime.program_runner import state_page_bytes
from aios_compile.runtime.results import Results
from aios_compile.runtime.staging import ALIGNMENT, SIDES, Staging

logger = logging.getLogger(__name__)


def token_buckets(max_num_batched_tokens: int) -> tuple[int, ...]:
    """Return the numbers of tokens that steps are padded to: 1, 2, 4, 8, then steps that grow.

    Padding costs at most an eighth beyond 64 tokens, and a model has a few dozen graphs at most.
    """
    buckets, size = [1, 2, 4], 8
    while size < max_num_batched_tokens:
        buckets.append(size)
        size += max(8, 1 << max(0, size.bit_length() - 4))
    return (*(b for b in buckets if b < max_num_batched_tokens), max_num_batched_tokens)


class GpuExecutor:
    """Runs batches of a program on a device, which it owns. See runtime.batch.Executor.

    modules: the kernel modules in the order of program.kernels. weights: WeightEntry.name -> array.
    captures: replay graphs (the default), else launch every kernel in every step. num_host_pages:
    pages of the second pool, in pinned host memory. choices: candidates that kernels run instead of
    their own; a graph keeps those that it was captured with. overlap: "always" where the device
    runs ahead of the host (AIOS_OVERLAP=0: "never", 2: "always" on any). `usable` until the device
    fails.
    """

    def __init__(
        self,
        program: Program,
        modules: Sequence[Any],
        weights: Mapping[str, NDArray[Any]],
        limits: Limits,
        device: Device,
        *,
        captures: bool = True,
        num_host_pages: int = 0,
        choices: KernelChoices = NO_CHOICES,
    ) -> None:
        self.usable = True
        self.choices = choices
        self.program, self.modules, self.limits, self.device = program, modules, limits, device
        check_residency(modules, device)
        self.buckets = limits.token_buckets or token_buckets(limits.max_num_batched_tokens)
        self.captures = captures
        self.calls: list[Call] = launch_list(program)
        self.graphs: dict[int, Graph] = {}
        self._compiled_before = 0
        self.num_late_captures = 0  # of buckets that a step had to capture while a request waited
        self._arena = device.allocate(program.plan.arena_bytes)
        self._counters = device.allocate(4 * program.counters)
        self._place_weights(weights)
        self._place_states()
        stride = sum(self._page_bytes)
        self._host = device.host_bytes(stride * (num_host_pages + 1) if num_host_pages else 0)
        self.staging = Staging(program.inputs, limits, device)
        self.results = Results(program, limits.max_num_logit_rows, device)
        self._sides = [StepSide(i, device.mark(), device.mark()) for i in range(SIDES)]
        self.num_begun = 0  # steps
        self.overlap = self._overlap()
        self._closed = False

    def _overlap(self) -> str:
        asked = env.OVERLAP.get_int(0, 2)
        samples = any(entry.name == SAMPLED for entry in self.program.outputs)
        ahead = asked == 2 or (asked == 1 and self.device.runs_ahead)
        return "always" if samples and ahead else "never"

    def _place_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Copy all weights into one block; a table gives the offset of each."""
        sizes = [weights[entry.name].nbytes for entry in self.program.weights]
        self._weight_offsets = _offsets(sizes)
        self._weights = self.device.allocate(sum(map(_aligned, sizes)))
        for entry, offset in zip(self.program.weights, self._weight_offsets):
            self.device.write(self._weights, offset, weights[entry.name])

    def _place_states(self) -> None:
        """Allocate the KV pages of all layers as one block, zeroed."""
        self._page_bytes = state_page_bytes(self.program)
        pools = [size * self.limits.num_pages for size in self._page_bytes]
        self._state_offsets = _offsets(pools)
        self._states = self.device.allocate(sum(map(_aligned, pools)))

    def sizes_of(self, bucket: int) -> dict[str, int]:
        """Return the sizes of a bucket's step: what its graph is captured with."""
        limits = self.limits
        return {
            "T": bucket,
            "S": min(limits.max_num_seqs, bucket),
            "R": min(limits.max_num_logit_rows, bucket),
            "P": limits.max_pages_per_sequence,
        }

    def operand(self, place: Place, pointer: str, sizes: Mapping[str, int]) -> Any:
        """Return the elements that a launch's operand begins at."""
        shift = place.offset(sizes)
        if place.space == "arena":
            return self.device.typed(self._arena, shift, pointer)
        if place.space == "counters":
            return self.device.typed(self._counters, shift, pointer)
        if place.space == "weight":
            begin = self._weight_offsets[place.index]
            return self.device.typed(self._weights, begin + shift, pointer)
        if place.space == "state":
            begin = self._state_offsets[place.index]
            return self.device.typed(self._states, begin + shift, pointer)
        if place.space == "packet":
            return self.device.typed(self.staging.packet, shift, pointer)
        if place.space == "results":
            return self.device.typed(self.results.memory, shift, pointer)
        begin = self.staging.offsets[self.program.inputs[place.index].name]
        return self.device.typed(self.staging.memory, begin + shift, pointer)

    def launch_all(self, sizes: Mapping[str, int]) -> None:
        """Launch every kernel of a step, in order, on what the inputs' block holds."""
        for call in self.calls:
            module = self.modules[call.kernel]
            assert len(module.TYPES) == len(call.operands), call.label
            operands = [self.operand(p, t, sizes) for p, t in zip(call.operands, module.TYPES)]
            name = self.choices.name_of(self.program.kernels[call.kernel].name, sizes["T"])
            chosen = {} if name == STANDARD else {"candidate": name}
            module.launch(operands, **sizes, **chosen)

    def capture(self, buckets: Sequence[int] | None = None) -> None:
        """Run each bucket once on padding (that compiles) and capture it, the largest first."""
        for bucket in sorted(buckets or self.buckets, reverse=True):
            sizes = self.sizes_of(bucket)
            self.staging.fill_empty()
            self.staging.upload()
            self.launch_all(sizes)
            self.device.synchronize()
            if self.captures:
                self.graphs[bucket] = self.device.capture(partial(self.launch_all, sizes))
        self._compiled_before = self.device.num_compiled

    @property
    def waited_us(self) -> float:
        """Return the microseconds that the host has waited for steps; the rest it was busy."""
        return sum(side.waited_us for side in self._sides)

    @property
    def num_late_compilations(self) -> int:
        """Return how many kernels were compiled after `capture`: it must be none."""
        return self.device.num_compiled - self._compiled_before

    def step(self, batch: Batch) -> StepResult:
        """Write the cache, compute the rows' logits and sample; results are valid until the next.

        Raises EngineError for a batch beyond the planned sizes, or if the device fails.
        """
        self.settle()
        found = self.begin(batch).finish()
        if not self.results.has_logits:
            return StepResult(**found, logits=NO_LOGITS)
        return LazyResult(partial(self.read_logits, batch.num_rows), found)

    def begin(
        self, batch: Batch, sources: Ints | None = None, hold: NDArray[np.int32] | None = None
    ) -> GpuStep:
        """Ask for a step and return; see OverlappingExecutor.begin. hold: is not looked at.

        Raises EngineError for a batch beyond the planned sizes, and for what fails while asking.
        """
        if self._closed:
            raise EngineClosedError("the model is closed")
        bucket = self._bucket(batch)
        sizes = self.sizes_of(bucket)
        side = self._sides[self.num_begun % SIDES]
        assert side.is_over, "three steps at once"
        self.staging.fill(batch, sources, side.index)  # fails, if at all, before anything is asked
        self.num_begun += 1
        try:
            self._ask(bucket, side)
        except Exception as error:
            with suppress(Exception):  # the first error is told; nothing may be left running
                self.device.synchronize()
            if isinstance(error, EngineError):
                raise
            raise self._failure(self.num_begun, error) from error
        views = partial(self.results.views, sizes["R"], batch.num_rows, side.index)
        side.step = GpuStep(self.num_begun, side, views, self._failure)
        return side.step

    def _ask(self, bucket: int, side: StepSide) -> None:
        """Ask for all that a step is: copy, graph, copy, mark."""
        sizes = self.sizes_of(bucket)
        if self.staging.moved:  # the lists have grown: captured graphs read the old place
            self.graphs.clear()
            self.staging.moved = False
        side.first.record()
        self.staging.upload(side.index)
        self._run(bucket, sizes)
        self.results.download(sizes["R"], side.index)
        side.last.record()

    def _failure(self, number: int, error: Exception) -> EngineError:
        """Return the error of a step; what fails on a device leaves nothing that can be trusted."""
        self.usable = False
        return EngineError(
            f"step {number} failed on {self.device.name}: {type(error).__name__}: {error}"
        )

    def settle(self) -> None:
        """Wait until no step runs that was begun."""
        for side in self._sides:
            side.settle()

    def _bucket(self, batch: Batch) -> int:
        limits = self.limits
        for what, got, most in (
            ("tokens", batch.num_tokens, self.buckets[-1]),
            ("sequences", batch.num_sequences, limits.max_num_seqs),
            ("logit rows", batch.num_rows, limits.max_num_logit_rows),
        ):
            if got > most:
                raise EngineError(f"a step of {got} {what}, planned for at most {most}")
        most = max(batch.num_tokens, batch.num_sequences, batch.num_rows)
        return next(bucket for bucket in self.buckets if bucket >= most)

    def _run(self, bucket: int, sizes: Mapping[str, int]) -> None:
        if not self.captures:
            self.launch_all(sizes)
            return
        if bucket not in self.graphs:
            self.num_late_captures += 1
            logger.warning("no graph of %d tokens was captured before: a step waits", bucket)
            self.graphs[bucket] = self.device.capture(partial(self.launch_all, sizes))
        self.graphs[bucket].replay()

    def read_logits(self, rows: int) -> NDArray[Any]:
        """Return the logits of the last step, float32 [rows, V]."""
        return self.results.read_logits(self._arena, rows)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, target) in all layers, in the order given."""
        for begin, size in zip(self._state_offsets, self._page_bytes):
            for source, target in pairs:
                self.device.copy(self._states, begin + source * size, begin + target * size, size)

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (page, host page) in all layers to the host's pool, and wait: so that
        what a swap costs can be measured.
        """
        self._swap(pairs, self.device.download)
        mark = self.device.mark()
        mark.record()
        mark.wait()

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (host page, page) in all layers back, before whatever comes next."""
        self._swap([(page, host_page) for host_page, page in pairs], self.device.upload)

    def _swap(
        self, pairs: Sequence[tuple[int, int]], copy: Callable[[Memory, int, Bytes], None]
    ) -> None:
        """Copy pages (page, host page) one way; a host page has all layers."""
        stride = sum(self._page_bytes)
        for page, host_page in pairs:
            place = host_page * stride
            for begin, size in zip(self._state_offsets, self._page_bytes):
                copy(self._states, begin + page * size, self._host[place : place + size])
                place += size

    def poison(self) -> None:
        """Fill activations and results with ones: what a step does not write is no number."""
        self._arena.fill_(255)
        self.results.memory.fill_(255)

    def copy_of_states(self) -> Memory:
        """Return a copy of all KV pages, on the device."""
        return self._states.clone()

    def state_bytes(self) -> Bytes:
        """Return a copy of all KV pages (tests and debugging)."""
        into = self.device.host_bytes(sum(map(_aligned, self._pools())))
        self.device.download(self._states, 0, into)
        self.device.synchronize()
        return into

    def _pools(self) -> list[int]:
        return [size * self.limits.num_pages for size in self._page_bytes]

    def close(self) -> None:
        """Drop graphs and memory. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with suppress(Exception):  # of a device that failed, and was told
            self.device.synchronize()
        self.graphs.clear()
        self._arena = self._weights = self._states = self._counters = None
        self.device.close()


def check_residency(modules: Sequence[Any], device: Device) -> None:
    """Check that the programs of persistent launches can all be resident: they wait for each other.

    Raises EngineError for a device with fewer multiprocessors than they are planned for.
    """
    there = device.num_processors()
    for module in modules:
        for programs, held in getattr(module, "RESIDENT", {}).items():
            if there is not None and programs > there * held:
                raise EngineError(
                    f"{module.__name__} waits inside a launch of {programs} programs, {held} a "
                    f"multiprocessor; the device has {there} of them and would wait for ever",
                    advice="load with persistent_decode=False: one launch a kernel",
                )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _offsets(sizes: Sequence[int]) -> list[int]:
    begins, end = [], 0
    for size in sizes:
        begins.append(end)
        end += _aligned(size)
    return begins
