"""What one step of the C++ target reads: sizes, tables of pointers; and a step that was begun.

Two of these take turns, so that the next step can be made ready and begun while one runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.program import Program, Ref

Pointers = NDArray[np.uint64]
Longs = NDArray[np.int64]
TOKEN_IDS = "token_ids"
RUNNING, ENDED = 2, 3  # as in codegen/cpp/step_line.h
ON_DEMAND = "logits"  # too much to keep of every step; nobody needs them of a step that is begun


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("T", "S", "R", "P")]


class _Run(ctypes.Structure):
    """Run in codegen/cpp/runtime.h."""

    _fields_ = [
        ("n", _Sizes),
        ("arena", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("choices", ctypes.c_void_p),
        ("nanoseconds", ctypes.c_void_p),
    ]


class _Copy(ctypes.Structure):
    _fields_ = [("source", ctypes.c_void_p), ("to", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


class _Begun(ctypes.Structure):
    """Begun in codegen/cpp/step_line.h."""

    _fields_ = [
        ("run", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("sources", ctypes.c_void_p),
        ("sampled", ctypes.c_void_p),
        ("hold", ctypes.c_void_p),
        ("copies", ctypes.c_void_p),
        ("num_copies", ctypes.c_int64),
        ("nanoseconds", ctypes.c_int64),
        ("state", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class StepTables:
    """Addresses that no step changes: the arena, each weight, each state."""

    arena: int
    weights: Pointers
    states: Pointers


class StepSlot:
    """One of the runner's two. Owner of the step's structures and of the copies of its results."""

    def __init__(self, program: Program, tables: StepTables, page_table_width: int) -> None:
        self._program, self._tables = program, tables
        self._inputs: Pointers = np.zeros(max(1, len(program.inputs)), np.uint64)
        self._bound: list[Any] = [None] * len(program.inputs)
        self._row_uses: dict[int, list[tuple[int, int]]] = {}
        self._rows = self._resolve_rows()
        self.run = _Run()
        self.run.n.P = page_table_width
        self.run.arena = tables.arena
        self.run.weights, self.run.states = tables.weights.ctypes.data, tables.states.ctypes.data
        self.run.inputs, self.run.rows = self._inputs.ctypes.data, self._rows.ctypes.data
        self.run_address = ctypes.addressof(self.run)
        names = [entry.name for entry in program.inputs]
        self._token_ids = names.index(TOKEN_IDS) if TOKEN_IDS in names else -1
        self._step = _Begun()  # of this slot, one after another
        self._kept: dict[str, NDArray[Any]] = {}
        self._num_kept = 0
        self._begun: Begun | None = None

    def _resolve_rows(self) -> Pointers:
        refs = [ref for f in self._program.functions for row in f.rows for ref in row]
        for i, ref in enumerate(refs):
            if ref.space == "input":
                assert isinstance(ref.shift, int)
                self._row_uses.setdefault(ref.index, []).append((i, ref.shift))
        return np.array([self._address(ref) for ref in refs] or [0], np.uint64)

    def _address(self, ref: Ref) -> int:
        assert isinstance(ref.shift, int), "argument rows have constant offsets"
        if ref.space == "arena":
            return self._tables.arena + ref.index + ref.shift
        if ref.space == "input":
            return 0  # bound by the first step
        table = {"weight": self._tables.weights, "state": self._tables.states}[ref.space]
        return int(table[ref.index]) + ref.shift

    def bind(
        self, inputs: Mapping[str, NDArray[Any]], sizes: tuple[int, int, int], choices: int
    ) -> None:
        """Point the tables at the inputs, once unless they move. sizes: T, S, R."""
        n = self.run.n
        n.T, n.S, n.R = sizes
        self.run.choices = choices
        for i, entry in enumerate(self._program.inputs):
            array = inputs[entry.name]
            if array is not self._bound[i]:
                assert array.flags.c_contiguous, f"{entry.name} is not contiguous"
                self._bind_input(i, array)

    def _bind_input(self, index: int, array: NDArray[Any]) -> None:
        self._bound[index] = array
        address = _address_of(array)
        if address != self._inputs[index]:
            self._inputs[index] = address
            for row, shift in self._row_uses.get(index, ()):
                self._rows[row] = address + shift

    @property
    def is_over(self) -> bool:
        """Return whether nobody waits for a step of this slot any more."""
        return self._begun is None or self._begun.is_over

    def settle(self) -> None:
        """Wait for the end of the step, if one was begun."""
        if not self.is_over:
            assert self._begun is not None
            self._begun.wait()

    def begin(
        self,
        library: ctypes.CDLL,
        line: int,
        outputs: Mapping[str, NDArray[Any]],
        sources: Longs | None,
        hold: NDArray[np.int32] | None,
    ) -> Begun:
        """Put the step that was bound in line. outputs: whole buffers, of which R rows are kept."""
        step = self._step
        if not self._kept:
            self._keep(outputs)
        if self._num_kept != self.run.n.R:
            self._num_kept = self.run.n.R
            for copy, kept in zip(self._copies, self._kept.values()):
                copy.bytes = kept.strides[0] * self._num_kept
        step.token_ids = int(self._inputs[self._token_ids])
        step.sources = None if sources is None else _address_of(sources)
        step.hold = None if hold is None else _address_of(hold)
        self._begun = Begun(library, line, self._kept, step, (sources, hold))
        return self._begun

    def _keep(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Make room for the results that are kept, and say from where they are copied."""
        kept = {name: view for name, view in outputs.items() if name != ON_DEMAND}
        self._kept = {name: np.zeros_like(view) for name, view in kept.items()}
        self._copies = (_Copy * len(kept))()
        for copy, (name, view) in zip(self._copies, kept.items()):
            copy.source, copy.to = _address_of(view), _address_of(self._kept[name])
        self._step.run = self.run_address
        self._step.sampled = _address_of(outputs["sampled_ids"])
        self._step.copies, self._step.num_copies = ctypes.addressof(self._copies), len(kept)


class Begun:
    """A step in line. `outputs` are its results once it has ended, until its slot's next step.

    used: arrays that live as long as this.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        line: int,
        outputs: Mapping[str, NDArray[Any]],
        step: _Begun,
        used: tuple[Any, ...],
    ) -> None:
        self.outputs = outputs
        self.is_over = self._has_run = False
        self._library, self._line, self._step, self._used = library, line, step, used
        self._address = ctypes.addressof(step)
        self._number = library.line_begin(line, self._address)

    def leave_out(self) -> bool:
        """Return whether it will not run: its turn had not come, and now never does."""
        return bool(self._library.line_leave_out(self._address))

    def make_sure(self) -> bool:
        """Return whether it runs or has run, or will for certain: nothing holds it back now."""
        had_turn = self._step.state in (RUNNING, ENDED)
        return had_turn or bool(self._library.line_make_sure(self._address))

    def wait(self) -> bool:
        """Wait for its end; return whether it ran."""
        if not self.is_over:
            ran = self._library.line_wait(self._line, self._address, self._number)
            self._has_run, self.is_over = bool(ran), True
        return self._has_run

    @property
    def micros(self) -> float:
        """How long it took."""
        return float(self._step.nanoseconds) / 1e3


def _address_of(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
