"""A step of sequences that each have one token, as one small step a worker (run_parts, runtime.h).

Why it pays: sequences do not depend on each other, so workers that share out the sequences meet at
the end of the step only; when they share out each kernel they meet at each of its phases, and read
what others wrote. It is for models whose weights a cache holds, as each worker reads all of them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.cpp import build
from aios_compile.codegen.operand import BYTES, dim_value
from aios_compile.codegen.program import Program, TensorEntry
from aios_compile.runtime.memory import Region
from aios_compile.runtime.run_tables import Copy, Memory, Run, RunTables, address_of
from aios_compile.runtime.step_slot import ON_DEMAND

# Tokens of a part, at least. Two workers of Zen 4, bundled model in bf16: 16 tokens in parts 1.27x
# as fast, 8 tokens 1.3x, 4 tokens 0.6x, as each worker reads all weights for its two.
LEAST_TOKENS = 4
COUNTED = ("query_starts", "logit_rows")  # hold numbers of tokens: those of a part are the first


class _Part(ctypes.Structure):
    """Part in codegen/cpp/run.h."""

    _fields_ = [("run", Run), ("copies", ctypes.c_void_p), ("num_copies", ctypes.c_int64)]


def may_split(program: Program, weight_bytes: int, num_threads: int) -> bool:
    """Return whether steps of a program are to be split: weights take half of the cache at most.

    The cache is the third, by the system. A virtual machine may take cores of several such caches
    for those of one: each of them then has a copy of the weights.
    """
    names = {entry.name for entry in program.inputs}
    samples = names.issuperset(COUNTED) and any(o.name == ON_DEMAND for o in program.outputs)
    return samples and num_threads > 1 and weight_bytes <= build.cache_bytes(3) // 2


class PartArenas:
    """An arena for each worker, whose pages are there once they are used."""

    def __init__(self, program: Program, count: int) -> None:
        self._regions = [Region(program.plan.arena_bytes) for _ in range(count)]
        self.addresses = [region.address for region in self._regions]

    def close(self) -> None:
        """Unmap. Idempotent; no step may run."""
        for region in self._regions:
            region.close()


class SplitStep:
    """The parts of a slot's steps. outputs: where the results of the whole step are looked for."""

    def __init__(
        self,
        program: Program,
        whole: RunTables,
        memory: Memory,
        arenas: PartArenas,
        outputs: Mapping[str, NDArray[Any]],
    ) -> None:
        self._program, self._whole, self._outputs = program, whole, outputs
        width = whole.run.n.P
        self._steps = np.array([_stride(e, width) for e in program.inputs], np.uint64)
        self._parts = (_Part * len(arenas.addresses))()
        self._tables: list[RunTables] = []
        self._copies: list[Any] = []
        # what nobody asks for in a step that was begun stands last
        self._results = sorted(program.outputs, key=lambda entry: entry.name == ON_DEMAND)
        for part, arena in zip(self._parts, arenas.addresses):
            own = Memory(arena, memory.weights, memory.states)
            self._tables.append(RunTables(program, own, width, part.run))
            copies = (Copy * len(self._results))()
            for copy, entry in zip(copies, self._results):
                copy.source = arena + entry.offset
            self._copies.append(copies)
            part.copies = ctypes.addressof(copies)
        self._counting = np.arange(program.sizes["T"] + 1, dtype=np.int64).tobytes()
        self._address = ctypes.addressof(self._parts)
        self._bound: tuple[int, int, bool, int] | None = None  # what the parts were made for

    def bind(
        self,
        inputs: Mapping[str, NDArray[Any]],
        wants_logits: bool,
        choices_of: Callable[[int], int],
    ) -> bool:
        """Split the step that the slot was bound to, if it can be; return whether it was.

        choices_of: the address of the candidates for a number of tokens.
        """
        run = self._whole.run
        num = run.n.T
        count = min(len(self._parts), num // LEAST_TOKENS)
        if not run.n.S == run.n.R == num or count < 2 or not self._counts(inputs, num):
            run.parts = None
            return False
        bound = num, self._whole.num_moves, wants_logits, run.choices
        if self._bound != bound:
            self._bound = bound
            for i in range(count):
                self._place(i, num * i // count, num * (i + 1) // count)
                part = self._parts[i]
                part.num_copies = len(self._results) - (not wants_logits)
                part.run.choices = choices_of(part.run.n.T)
        run.parts, run.num_parts = self._address, count
        return True

    def _counts(self, inputs: Mapping[str, NDArray[Any]], num: int) -> bool:
        """Return whether row i is of token i and token i of sequence i."""
        return all(self._counting.startswith(inputs[name].tobytes()) for name in COUNTED)

    def _place(self, index: int, first: int, end: int) -> None:
        """Let a part be of the tokens [first, end)."""
        tables = self._tables[index]
        n = tables.run.n
        n.T = n.S = n.R = end - first
        tables.bind_behind(self._whole, self._steps * np.uint64(first))
        for copy, entry in zip(self._copies[index], self._results):
            view = self._outputs[entry.name]
            copy.to = address_of(view) + first * view.strides[0]
            copy.bytes = (end - first) * view.strides[0]


def _stride(entry: TensorEntry, page_table_width: int) -> int:
    """Return the bytes from one token's, sequence's or row's part of an input to the next one's.

    0 where an input is not theirs, or where it counts tokens.
    """
    first, *rest = entry.shape
    if isinstance(first, int) or entry.name in COUNTED:
        return 0
    if not any(term == ((name,), 1) for term in first.terms for name in "TSR"):
        return 0
    width = math.prod(dim_value(dim, {"P": page_table_width}) for dim in rest)
    return BYTES[entry.dtype] * width
