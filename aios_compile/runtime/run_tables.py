"""What one run of the C++ target is called with: sizes and tables of pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.program import Program, Ref

Pointers = NDArray[np.uint64]


class Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("T", "S", "R", "P")]


class Run(ctypes.Structure):
    """Run in codegen/cpp/run.h."""

    _fields_ = [
        ("n", Sizes),
        ("arena", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("choices", ctypes.c_void_p),
        ("nanoseconds", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("num_parts", ctypes.c_int64),
    ]


class Copy(ctypes.Structure):
    """Copy in codegen/cpp/run.h."""

    _fields_ = [("source", ctypes.c_void_p), ("to", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


@dataclass(frozen=True)
class Memory:
    """Addresses that no step changes: the arena, each weight, each state."""

    arena: int
    weights: Pointers
    states: Pointers


class RunTables:
    """Owner of a run's tables; `run` points to them. `inputs`: the address of each input."""

    def __init__(self, program: Program, memory: Memory, page_table_width: int, run: Run) -> None:
        self._program, self._memory, self.run = program, memory, run
        self.inputs: Pointers = np.zeros(max(1, len(program.inputs)), np.uint64)
        self.num_moves = 0  # how often an input came from another address than before
        self._bound: list[Any] = [None] * len(program.inputs)
        self._rows = self._resolve_rows()
        run.n.P = page_table_width
        run.arena = memory.arena
        run.weights, run.states = memory.weights.ctypes.data, memory.states.ctypes.data
        run.inputs, run.rows = self.inputs.ctypes.data, self._rows.ctypes.data

    def _resolve_rows(self) -> Pointers:
        refs = [ref for f in self._program.functions for row in f.rows for ref in row]
        uses = [(i, ref.index, ref.shift) for i, ref in enumerate(refs) if ref.space == "input"]
        columns = np.array(uses, np.int64).reshape(-1, 3).T
        self._uses, self._used = columns[0], columns[1]  # places in the rows, and of which input
        self._shifts = columns[2].astype(np.uint64)
        return np.array([self._address(ref) for ref in refs] or [0], np.uint64)

    def _address(self, ref: Ref) -> int:
        assert isinstance(ref.shift, int), "argument rows have constant offsets"
        if ref.space == "arena":
            return self._memory.arena + ref.index + ref.shift
        if ref.space == "input":
            return 0  # bound by the first step
        table = {"weight": self._memory.weights, "state": self._memory.states}[ref.space]
        return int(table[ref.index]) + ref.shift

    def bind(
        self, inputs: Mapping[str, NDArray[Any]], sizes: tuple[int, int, int], choices: int
    ) -> None:
        """Point the tables at the inputs, once unless they move. sizes: T, S, R."""
        n = self.run.n
        n.T, n.S, n.R = sizes
        self.run.choices = choices
        moves = self.num_moves
        for i, entry in enumerate(self._program.inputs):
            array = inputs[entry.name]
            if array is not self._bound[i]:
                assert array.flags.c_contiguous, f"{entry.name} is not contiguous"
                self._bound[i] = array
                address = address_of(array)
                self.num_moves += address != self.inputs[i]
                self.inputs[i] = address
        if moves != self.num_moves:
            self._fill_rows()

    def bind_behind(self, whole: RunTables, shifts: Pointers) -> None:
        """Point the tables at `whole`'s inputs, each so many bytes behind its begin."""
        np.add(whole.inputs, shifts, out=self.inputs)
        self._fill_rows()

    def _fill_rows(self) -> None:
        if len(self._uses):
            self._rows[self._uses] = self.inputs[self._used] + self._shifts


def address_of(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
