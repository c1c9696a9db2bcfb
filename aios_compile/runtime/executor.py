"""The Executor of the C++ target: a program runner behind the engine's step interface."""

from __future__ import annotations

from collections.abc import Sequence

from aios_compile.errors import EngineError
from aios_compile.runtime.batch import Batch, Limits, StepResult
from aios_compile.runtime.program_runner import ProgramRunner


class CpuExecutor:
    """Runs batches on a ProgramRunner, which it owns. See runtime.batch.Executor."""

    usable = True

    def __init__(self, runner: ProgramRunner, limits: Limits) -> None:
        self.runner = runner
        self.limits = limits

    def step(self, batch: Batch) -> StepResult:
        """Write the cache, compute the rows' logits and sample; results are valid until the next.

        Raises EngineError for a batch beyond the planned sizes.
        """
        limits = self.limits
        for what, got, most in (
            ("tokens", batch.num_tokens, limits.max_num_batched_tokens),
            ("sequences", batch.num_sequences, limits.max_num_seqs),
            ("logit rows", batch.num_rows, limits.max_num_logit_rows),
        ):
            if got > most:
                raise EngineError(f"a step of {got} {what}, planned for at most {most}")
        rows = batch.num_rows
        self.runner.run(vars(batch), batch.num_tokens, batch.num_sequences, rows)
        return StepResult(**{name: view[:rows] for name, view in self.runner.outputs.items()})

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
