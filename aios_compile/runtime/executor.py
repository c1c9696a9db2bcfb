"""The Executor of the C++ target: a program runner behind the engine's step interface."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aios_compile import env
from aios_compile.errors import EngineError
from aios_compile.runtime.batch import NO_LOGITS, Batch, Ints, Limits, StepResult
from aios_compile.runtime.program_runner import ProgramRunner
from aios_compile.runtime.step_slot import Begun


class CpuExecutor:
    """Runs batches on a ProgramRunner, which it owns. See runtime.batch.OverlappingExecutor."""

    usable = True

    def __init__(self, runner: ProgramRunner, limits: Limits) -> None:
        self.runner = runner
        self.limits = limits
        self._cores = env.num_cores()
        self._overlap = env.OVERLAP.get_int(0, 2) if runner.can_begin else 0

    @property
    def overlap(self) -> str:
        """Return "measured" if a core is left for the host while a step runs, or what was asked."""
        if self._overlap == 1:
            return "measured" if self.runner.num_threads < self._cores else "never"
        return "always" if self._overlap else "never"

    def step(self, batch: Batch) -> StepResult:
        """Write the cache, compute the rows' logits and sample; results are valid until the next.

        Raises EngineError for a batch beyond the planned sizes.
        """
        self._check(batch)
        rows = batch.num_rows
        self.runner.run(vars(batch), batch.num_tokens, batch.num_sequences, rows)
        return StepResult(**{name: view[:rows] for name, view in self.runner.outputs.items()})

    def begin(
        self, batch: Batch, sources: Ints | None = None, hold: NDArray[np.int32] | None = None
    ) -> CpuStep:
        """Begin a step and return; see OverlappingExecutor.begin."""
        self._check(batch)
        sizes = batch.num_tokens, batch.num_sequences, batch.num_rows
        return CpuStep(self.runner.begin(vars(batch), *sizes, sources, hold), batch.num_rows)

    def _check(self, batch: Batch) -> None:
        limits = self.limits
        for what, got, most in (
            ("tokens", batch.num_tokens, limits.max_num_batched_tokens),
            ("sequences", batch.num_sequences, limits.max_num_seqs),
            ("logit rows", batch.num_rows, limits.max_num_logit_rows),
        ):
            if got > most:
                raise EngineError(f"a step of {got} {what}, planned for at most {most}")

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, target) in all layers, in the order given."""
        self.runner.copy_pages(pairs)

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (page, host page) in all layers to the second pool."""
        self.runner.swap_out(pairs)

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (host page, page) in all layers back."""
        self.runner.swap_in(pairs)

    def close(self) -> None:
        """Stop the threads and unmap all memory. Idempotent."""
        self.runner.close()


class CpuStep:
    """A step that was begun. See runtime.batch.BegunStep."""

    def __init__(self, begun: Begun, num_rows: int) -> None:
        self._begun, self._num_rows = begun, num_rows

    @property
    def micros(self) -> float:
        return self._begun.micros

    def leave_out(self) -> bool:
        """Return whether it will not run: its turn had not come, and now never does."""
        return self._begun.leave_out()

    def make_sure(self) -> bool:
        """Return whether it runs whatever holds it back: False, it was left out before."""
        return self._begun.make_sure()

    def wait(self) -> StepResult | None:
        """Wait for its end; None: it was left out."""
        if not self._begun.wait():
            return None
        rows, found = self._num_rows, self._begun.outputs
        return StepResult(**{n: view[:rows] for n, view in found.items()}, logits=NO_LOGITS)
