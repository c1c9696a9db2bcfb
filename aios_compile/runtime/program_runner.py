"""Run a compiled program on the CPU: numpy and ctypes only, no torch.

Owns the arena, the KV pool, the thread pool and the pointer tables. One thread calls `run`.
"""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile import env
from aios_compile.codegen.kernel_choices import NO_CHOICES, KernelChoices
from aios_compile.codegen.operand import BYTES, dim_value
from aios_compile.codegen.program import Program, TensorEntry
from aios_compile.errors import EngineClosedError, EngineError
from aios_compile.runtime.memory import Region
from aios_compile.runtime.run_tables import Memory
from aios_compile.runtime.split_step import PartArenas, SplitStep, may_split
from aios_compile.runtime.step_slot import Begun, StepSlot

SPINS = 20_000  # about a millisecond of pause instructions; 50 us parked at every barrier
# Of each layer's keys and values these lie in small pages: short contexts (256 tokens of 8 heads of
# 128 in bf16) would touch 2 MiB a layer otherwise, 120 MB in a model of 28 layers.
SHORT_BYTES = 512 << 10
NUMPY_DTYPES = {
    "f32": np.float32, "i64": np.int64, "f64": np.float64, "i32": np.int32, "bool": np.bool_,
    "bf16": np.uint16, "f16": np.float16, "i16": np.int16, "i8": np.int8, "u8": np.uint8,
    "e4m3": np.uint8,
}  # fmt: skip
Pointers = NDArray[np.uint64]
Longs = NDArray[np.int64]


def state_page_bytes(program: Program) -> list[int]:
    """Return the bytes of one page of each state (KV cache of a layer)."""
    return [int(np.prod(s.page_shape)) * BYTES[s.dtype] for s in program.states]


class ProgramRunner:
    """One program with its memory and threads.

    weights: WeightEntry.name -> array whose memory outlives the runner. num_pages: KV pages, the
    trash page included. page_table_width: entries of a page-table row. num_host_pages: pages of the
    second pool, the host's; its memory is not touched before a page is swapped out. choices: the
    kernels' candidates. guarded: tests only; the arena is exactly the plan's bytes between pages
    that may not be touched, poisoned before each run.
    """

    def __init__(
        self,
        program: Program,
        library: ctypes.CDLL,
        weights: Mapping[str, NDArray[Any]],
        num_threads: int,
        *,
        num_pages: int = 0,
        page_table_width: int = 0,
        num_host_pages: int = 0,
        guarded: bool = False,
        choices: KernelChoices = NO_CHOICES,
    ) -> None:
        self.program = program
        self._set_choices(choices)
        self._library = library
        self._guarded = guarded
        self._pid = os.getpid()
        self._closed = False
        self._keep: dict[str, Any] = {"weights": weights}
        self._page_bytes = state_page_bytes(program)
        self._arena = Region(program.plan.arena_bytes, guarded=guarded)
        pool_bytes = [-(-b * num_pages // 64) * 64 for b in self._page_bytes]
        self._kv = Region(sum(pool_bytes), guarded=guarded, huge=False)
        self._host = Region(sum(self._page_bytes) * (num_host_pages + 1) if num_host_pages else 0)
        begins = np.cumsum([0, *pool_bytes[:-1]]) if pool_bytes else np.zeros(0, np.int64)
        for begin, size in zip(begins.tolist(), pool_bytes):
            self._kv.ask_for_huge_pages(begin + SHORT_BYTES, begin + size)
        self._states: Pointers = np.array([self._kv.address + int(b) for b in begins], np.uint64)
        self._weights: Pointers = np.array(
            [weights[w.name].ctypes.data for w in program.weights], np.uint64
        )
        self._memory = Memory(self._arena.address, self._weights, self._states)
        # one for `run` and, with another one, for `begin`: a step may wait while one runs
        self._slots = [StepSlot(program, self._memory, page_table_width) for _ in range(2)]
        self._weight_bytes = sum(weights[w.name].nbytes for w in program.weights)
        self._arenas: PartArenas | None = None
        self._splits: list[SplitStep] = []  # of the slots
        self.num_split_steps = 0
        self.outputs = {o.name: self._output_view(o) for o in program.outputs}
        self._bind_library()
        self._pool = self._line = self._num_begun = 0
        self.num_threads = 0
        self.set_num_threads(num_threads)

    def _bind_library(self) -> None:
        lib = self._library
        lib.pool_new.restype = ctypes.c_void_p
        lib.pool_new.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int64]
        lib.pool_size.argtypes = [ctypes.c_void_p]
        lib.pool_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        lib.pool_step.restype = None
        lib.pool_free.argtypes = lib.pool_rest.argtypes = [ctypes.c_void_p]
        lib.pool_free.restype = lib.pool_rest.restype = None
        lib.line_new.restype = ctypes.c_void_p
        lib.line_new.argtypes = lib.line_free.argtypes = [ctypes.c_void_p]
        lib.line_free.restype = None
        lib.line_begin.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        lib.line_leave_out.argtypes = lib.line_make_sure.argtypes = [ctypes.c_void_p]
        lib.line_wait.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        lib.step_num_counters.restype = ctypes.c_int64

    def set_num_threads(self, num_threads: int) -> None:
        """Replace the thread pool, once no step runs."""
        self._free_pool()
        counters = self._library.step_num_counters()
        self._pool = self._library.pool_new(num_threads, SPINS, counters)
        if not self._pool:
            raise EngineError(f"cannot start a pool of {num_threads} threads")
        self.num_threads = self._library.pool_size(self._pool)
        self._make_parts()

    def _make_parts(self) -> None:
        """Make room for steps that are split, where they are."""
        splits = env.SPLIT_STEPS.get_int(0, 1) and not self._guarded
        if not splits or not may_split(self.program, self._weight_bytes, self.num_threads):
            return
        self._arenas = PartArenas(self.program, self.num_threads)
        self._splits = [
            SplitStep(self.program, slot.tables, self._memory, self._arenas, self.outputs)
            for slot in self._slots
        ]

    def _free_pool(self) -> None:
        if self._line:
            self.settle()
            self._library.line_free(self._line)
        if self._pool:
            self._library.pool_free(self._pool)
        self._line = self._pool = 0
        self._splits.clear()
        for slot in self._slots:
            slot.run.parts = None
        if self._arenas is not None:
            self._arenas.close()
        self._arenas = None

    def _output_view(self, entry: TensorEntry) -> NDArray[Any]:
        """Return the whole planned buffer of an output, for its largest shape."""
        shape = [dim_value(d, self.program.sizes) for d in entry.shape]
        dtype = np.dtype(NUMPY_DTYPES[entry.dtype])
        begin = entry.offset
        raw = self._arena.array()[begin : begin + int(np.prod(shape)) * dtype.itemsize]
        return raw.view(dtype).reshape(shape)

    def run(
        self, inputs: Mapping[str, NDArray[Any]], num_tokens: int, num_seqs: int, num_rows: int
    ) -> None:
        """Run the program once; results are in `outputs` (whole buffers) until the next run."""
        self.settle()
        slot = self._slots[0]
        self._prepare(0, inputs, (num_tokens, num_seqs, num_rows), wants_logits=True)
        self._library.pool_step(self._pool, slot.run_address)

    def begin(
        self,
        inputs: Mapping[str, NDArray[Any]],
        num_tokens: int,
        num_seqs: int,
        num_rows: int,
        sources: Longs | None = None,
        hold: NDArray[np.int32] | None = None,
    ) -> Begun:
        """Begin a run behind the one that runs, if any, and return at once; see StepSlot.

        At most two are begun and not waited for. Of the inputs only token_ids may be written, by
        the step: those that sources takes from what the run before samples.
        """
        if not self._line:
            self._line = self._library.line_new(self._pool)
            if not self._line:
                raise EngineError("cannot start the thread that runs steps")
        turn = self._num_begun % 2
        slot = self._slots[turn]
        assert slot.is_over, "three steps at once"
        self._prepare(turn, inputs, (num_tokens, num_seqs, num_rows), wants_logits=False)
        self._num_begun += 1
        return slot.begin(self._library, self._line, self.outputs, sources, hold)

    def _prepare(
        self,
        turn: int,
        inputs: Mapping[str, NDArray[Any]],
        sizes: tuple[int, int, int],
        *,
        wants_logits: bool,
    ) -> None:
        if self._pid != os.getpid():
            raise EngineClosedError(
                "the model belongs to the parent process", advice="load it again after the fork"
            )
        if self._closed:
            raise EngineClosedError("the model is closed")
        if self._guarded:
            self._arena.poison()
        slot = self._slots[turn]
        slot.tables.bind(inputs, sizes, self._choices_of(sizes[0]))
        if self._splits and not slot.run.nanoseconds:
            split = self._splits[turn].bind(inputs, wants_logits, self._choices_of)
            self.num_split_steps += split

    def _choices_of(self, num_tokens: int) -> int:
        """Return the address of the candidates that are chosen for so many tokens."""
        bucket = bisect_left(self._buckets, num_tokens)
        return int(self._choices_address + bucket * self._choices.shape[1])

    @property
    def can_begin(self) -> bool:
        """Return whether steps can be begun: the program samples, and no test poisons its arena."""
        return "sampled_ids" in self.outputs and not self._guarded

    def settle(self) -> None:
        """Wait until no step runs that was begun."""
        for slot in self._slots:
            slot.settle()

    def choose(self, choices: KernelChoices) -> None:
        """Use other candidates from the next run on."""
        self.settle()
        self._library.pool_rest(self._pool)  # a worker that comes late reads the old ones
        self._set_choices(choices)

    def _set_choices(self, choices: KernelChoices) -> None:
        self._buckets, self._choices = choices.buckets, choices.table(self.program)
        self._choices_address = int(self._choices.ctypes.data)

    def time_kernels(self, nanoseconds: Longs | None) -> None:
        """Add to nanoseconds[kernel] in every run, for kernels that have candidates; None: stop.

        The time is that of a kernel's phases, from barrier to barrier.
        """
        self._keep["nanoseconds"] = nanoseconds
        for slot in self._slots:
            slot.run.nanoseconds = None if nanoseconds is None else nanoseconds.ctypes.data
            slot.run.parts = None  # kernels are timed where all workers share them

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, target) in all layers, in the order given."""
        self.settle()
        for base, size in zip(self._states, self._page_bytes):
            for source, target in pairs:
                ctypes.memmove(int(base) + target * size, int(base) + source * size, size)

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (page, host page) to the host's pool; a host page has all layers."""
        self.settle()
        stride = sum(self._page_bytes)
        for page, host_page in pairs:
            place = self._host.address + host_page * stride
            for base, size in zip(self._states, self._page_bytes):
                ctypes.memmove(place, int(base) + page * size, size)
                place += size

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (host page, page) back."""
        self.settle()
        stride = sum(self._page_bytes)
        for host_page, page in pairs:
            place = self._host.address + host_page * stride
            for base, size in zip(self._states, self._page_bytes):
                ctypes.memmove(int(base) + page * size, place, size)
                place += size

    def poison_pages(self, pages: Sequence[int]) -> None:
        """Fill pages with NaN bytes in all layers (tests: freed pages must never be read)."""
        self.settle()
        for base, size in zip(self._states, self._page_bytes):
            for page in pages:
                ctypes.memset(int(base) + page * size, 0xFF, size)

    def close(self) -> None:
        """Stop the threads and unmap all memory. Idempotent; a forked child joins nothing."""
        if self._closed:
            return
        self._closed = True
        if self._pid == os.getpid():
            self._free_pool()
        self.outputs.clear()
        self._slots.clear()
        self._keep.clear()
        self._arena.close()
        self._kv.close()
        self._host.close()
