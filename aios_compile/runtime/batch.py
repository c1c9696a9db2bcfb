"""What one step takes and gives: the boundary between the runtime and the compiled program.

Legend: T tokens, S sequences, R logit rows, P page-table width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

NO_LOGITS: Floats = np.zeros((0, 0), np.float32)  # of a step that was begun: nobody looks
TRASH_PAGE = 0  # padded tokens write here and nobody reads it (a slot of -1 would be the last slot)


@dataclass(frozen=True)
class Limits:
    """Sizes that the program was planned for; no batch exceeds them.

    num_pages counts the trash page. token_buckets, if any, are the only T that a step may have
    (ascending; the last one at least max_num_batched_tokens): batches are padded up to the next.
    unfolds: the executor makes positions, slots and padding itself (on its device): a batch then
    has no padding, positions and slots that mean nothing, and of each sequence's sequence_lengths
    only the first.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_num_logit_rows: int
    max_pages_per_sequence: int
    num_pages: int
    page_size: int
    max_model_len: int
    vocab_size: int
    token_buckets: tuple[int, ...] = ()
    unfolds: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            assert name in ("token_buckets", "unfolds") or value >= 1, (
                f"{name}={value} must be at least 1"
            )
        assert self.num_pages >= 2, "page 0 is the trash page: a pool needs at least two pages"
        if self.token_buckets:
            assert list(self.token_buckets) == sorted(set(self.token_buckets))
            assert self.token_buckets[-1] >= self.max_num_batched_tokens

    @property
    def max_running(self) -> int:
        """Sequences that may run at once, so that each can always have one token and one row."""
        return min(self.max_num_seqs, self.max_num_batched_tokens, self.max_num_logit_rows)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that one sequence can have in the cache at most: the pool and the page table."""
        return min(self.num_pages - 1, self.max_pages_per_sequence) * self.page_size

    def padded_tokens(self, num_tokens: int) -> int:
        """Return the smallest bucket that holds `num_tokens`, or `num_tokens` without buckets."""
        if not self.token_buckets:
            return num_tokens
        return next(bucket for bucket in self.token_buckets if bucket >= num_tokens)


@dataclass
class Batch:
    """Inputs of one step: contiguous arrays that stay valid until the next batch is built.

    They are views of the builder's buffers; executors read and never write them. The list arrays
    (penalty_*, bias_*, allowed_*) may move between steps, the others never do.
    """

    token_ids: Ints  # [T]
    positions: Ints  # [T]
    sequence_lengths: Ints  # [T] max(prompt length, position + 1): what dynamic RoPE looks at
    slots: Ints  # [T] page * page_size + offset
    query_starts: Ints  # [S+1] offsets into T
    context_lengths: Ints  # [S] tokens in the cache including this step's
    page_tables: Ints  # [S, P]
    logit_rows: Ints  # [R] token indices whose logits are needed
    temperature: Floats  # [R] 0 = greedy
    top_k: Ints  # [R] 0 = off
    top_p: Floats  # [R]
    min_p: Floats  # [R]
    seeds: Ints  # [R] the bits of a uint64
    sample_positions: Ints  # [R] position of the token being sampled
    repetition_penalty: Floats  # [R]
    presence_penalty: Floats  # [R]
    frequency_penalty: Floats  # [R]
    penalty_starts: Ints  # [R+1]
    penalty_ids: Ints  # [NP] unique in a row
    penalty_counts: Ints  # [NP] times in the output so far; 0 = only in the prompt
    bias_starts: Ints  # [R+1]
    bias_ids: Ints  # [NB] unique in a row
    bias_values: Floats  # [NB] added; -inf bans
    allowed_starts: Ints  # [R+1]
    allowed_ids: Ints  # [NA] ascending and unique in a row; an empty row allows all
    logprob_counts: Ints  # [R] 0..20
    given_ids: Ints  # [R] the token to report when has_given
    has_given: Ints  # [R] 1: do not sample, report given_ids (prompt logprobs)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lengths)

    @property
    def num_rows(self) -> int:
        return len(self.logit_rows)


@dataclass
class StepResult:
    """Outputs of one step, valid until the next. finite 0: a raw logit was NaN or Inf."""

    sampled_ids: Ints  # [R]
    logprobs: Floats  # [R] of the sampled (or given) token, from the raw logits
    ranks: Ints  # [R] 1 = the most likely token
    top_ids: Ints  # [R, 20]
    top_logprobs: Floats  # [R, 20]
    finite: Ints  # [R]
    logits: Floats  # [R, V] raw


class Executor(Protocol):
    """Runs the compiled program. Called from one thread only, the engine's.

    An attribute `usable: bool`, read after `step` raised, says whether further steps may run;
    without it the engine closes.
    """

    limits: Limits

    def step(self, batch: Batch) -> StepResult:
        """Run one step: write the cache, compute the logits of the rows, sample."""
        ...

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, target) in all layers, in the order given."""
        ...

    def close(self) -> None:
        """Free everything; idempotent."""
        ...


class BegunStep(Protocol):
    """A step that was begun: it runs after the one before it, or waits for its turn."""

    micros: float  # that it took; once it has ended

    def leave_out(self) -> bool:
        """Return whether it will not run: its turn had not come, and now never does."""
        ...

    def make_sure(self) -> bool:
        """Return whether it runs whatever holds it back from now on: False, it was left out."""
        ...

    def wait(self) -> StepResult | None:
        """Wait for its end; None: it was left out. The result is valid until the next but one."""
        ...


class OverlappingExecutor(Executor, Protocol):
    """An Executor whose steps run while the host does something else; two at most are begun.

    `step`, page copies and swaps wait until none of those runs. overlap: "never", "always", or
    "measured" where it may pay; it may change between steps.
    """

    overlap: str

    def begin(
        self, batch: Batch, sources: Ints | None = None, hold: NDArray[np.int32] | None = None
    ) -> BegunStep:
        """Begin a step without wanted logits, behind the one that runs if any; return at once.

        sources: [T] the row of the step before that samples token i, -1 where token_ids has it: ids
        go from step to step on the device. The batch stays as it is until the step has ended. hold:
        one number; if it is not 0 when the step's turn comes, the step is left out (a device that
        queues work ahead cannot look, and runs it).
        """
        ...


class SwappingExecutor(Executor, Protocol):
    """An Executor with a second pool of pages, in host memory; its page 0 is not used."""

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (page, host page) in all layers to host memory."""
        ...

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (host page, page) in all layers back."""
        ...
