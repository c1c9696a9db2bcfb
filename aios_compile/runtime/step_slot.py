"""One step of the C++ target: its tables of pointers, and the step itself where it was begun.

Two of these take turns, so that the next step can be made ready and begun while one runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.program import Program
from aios_compile.runtime.run_tables import Copy, Memory, Run, RunTables, address_of

Longs = NDArray[np.int64]
TOKEN_IDS = "token_ids"
RUNNING, ENDED = 2, 3  # as in codegen/cpp/step_line.h
ON_DEMAND = "logits"  # too much to keep of every step; nobody needs them of a step that is begun


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


class StepSlot:
    """One of the runner's two. Owner of the step's structures and of the copies of its results."""

    def __init__(self, program: Program, memory: Memory, page_table_width: int) -> None:
        self.run = Run()
        self.run_address = ctypes.addressof(self.run)
        self.tables = RunTables(program, memory, page_table_width, self.run)
        names = [entry.name for entry in program.inputs]
        self._token_ids = names.index(TOKEN_IDS) if TOKEN_IDS in names else -1
        self._step = _Begun()  # of this slot, one after another
        self._kept: dict[str, NDArray[Any]] = {}
        self._num_kept = 0
        self._begun: Begun | None = None

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
        step.token_ids = int(self.tables.inputs[self._token_ids])
        step.sources = None if sources is None else address_of(sources)
        step.hold = None if hold is None else address_of(hold)
        self._begun = Begun(library, line, self._kept, step, (sources, hold))
        return self._begun

    def _keep(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Make room for the results that are kept, and say from where they are copied."""
        kept = {name: view for name, view in outputs.items() if name != ON_DEMAND}
        self._kept = {name: np.zeros_like(view) for name, view in kept.items()}
        self._copies = (Copy * len(kept))()
        for copy, (name, view) in zip(self._copies, kept.items()):
            copy.source, copy.to = address_of(view), address_of(self._kept[name])
        self._step.run = self.run_address
        self._step.sampled = address_of(outputs["sampled_ids"])
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
