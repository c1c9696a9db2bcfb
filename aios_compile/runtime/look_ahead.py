"""Begins the next decode step while one runs, so that the host's work costs no time.

The scheduler decides about step n + 1 only after the commit of step n, as always; but what it will
decide is nearly always known before: each sequence goes on by one token. So the step is begun on
that guess, right behind the one that runs, and takes the ids from it on the device::

    device   | step n          | step n + 1      | step n + 2 ...
    host     | guess n + 1     | commit n, schedule n + 1: as guessed; text, log, guess n + 2 | ...

If the true plan is another one (somebody ended, came or gave way), what was begun is left out, or
its end is awaited and its results are dropped: at most one step in vain. Nothing of it can be seen:
it wrote behind the last computed token of sequences' own pages, or to pages that were free, and
whatever is written there later is written after it. So plans, tokens, the log and its replay are
those of an engine that never guesses.

What comes from callers holds the guess back until it was looked at (`Inbox.hold`), and a step that
had its turn before is committed first: nobody waits longer than for a step that was running.

Where that does not pay (overlap_governor.py), steps run one after the other, as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from aios_compile.runtime.batch import Batch, BegunStep, Executor, Ints, OverlappingExecutor
from aios_compile.runtime.batch_builder import BatchBuilder
from aios_compile.runtime.engine_stats import EngineStats
from aios_compile.runtime.overlap_governor import OverlapGovernor
from aios_compile.runtime.request import Sequence
from aios_compile.runtime.schedule_state import Chunk, Plan, SchedulerState, SequenceState


class Running(NamedTuple):
    """A step that was begun, and its batch."""

    batch: Batch
    step: BegunStep


class _Guess(NamedTuple):
    """What the next plan is expected to be, and the pages that it is expected to find."""

    chunks: list[Chunk]
    states: list[SequenceState]
    epochs: list[int]
    new_pages: dict[int, int]  # by row, the page that its sequence will get


class LookAhead:
    """One guess at most. hold: a number that callers set when they leave something for the engine.

    first: the builder of steps that are not guessed. Used by the engine's thread alone.
    """

    def __init__(
        self,
        executor: Executor,
        first: BatchBuilder,
        hold: NDArray[np.int32],
        stats: EngineStats,
    ) -> None:
        self._executor = cast(OverlappingExecutor, executor)
        self._can = hasattr(executor, "begin")
        self._builders = (first, BatchBuilder(executor.limits)) if self._can else (first,)
        self._turn = 0  # the builder whose batch runs
        self._hold = hold
        self._guess: _Guess | None = None
        self._begun: Running | None = None
        count = executor.limits.padded_tokens(executor.limits.max_num_batched_tokens)
        self._rows: Ints = np.arange(count, dtype=np.int64)  # token i is what row i samples
        self._stats = stats
        self._governor = OverlapGovernor()

    @property
    def is_on(self) -> bool:
        """Return whether steps are to be begun ahead."""
        return self._can and self._executor.overlap != "never"

    @property
    def is_begun(self) -> bool:
        """Return whether a step was begun ahead and not taken yet."""
        return self._begun is not None

    def measure(self, plan: Plan, was_ahead: bool, micros: float) -> None:
        """Take in the time of a step of decodes that could have been begun ahead, or was."""
        if self.is_on and plan.num_decodes == len(plan.chunks):
            self._governor.measure(len(plan.chunks), was_ahead, micros)

    @property
    def pages(self) -> list[int]:
        """Return the pages that are free and that the step which was begun ahead writes."""
        return [] if self._guess is None else list(self._guess.new_pages.values())

    def begin(self, batch: Batch) -> Running:
        """Begin a step that was not guessed; its batch is the first builder's."""
        assert self._begun is None
        self._turn = 0
        return Running(batch, self._executor.begin(batch))

    def take(self, plan: Plan, states: Mapping[int, SequenceState]) -> Running | None:
        """Return the step that was begun for just this plan; else drop what was begun."""
        guess, begun = self._guess, self._begun
        if guess is None or begun is None:
            return None
        if not _is(plan, guess, states) or not begun.step.make_sure():
            self.drop()
            return None
        self._guess = self._begun = None
        self._turn ^= 1
        self._stats.num_steps_ahead += 1
        return begun

    def must_go_on(self) -> bool:
        """Return whether a step had its turn: then it is committed before anything else is done.

        If it had not, it is left out now.
        """
        if self._begun is None:
            return False
        if not self._begun.step.leave_out():
            return True
        self.drop()
        return False

    def drop(self) -> None:
        """Forget the guess, once nothing of it runs."""
        begun, self._begun, self._guess = self._begun, None, None
        if begun is not None:
            begun.step.leave_out()
            with suppress(Exception):  # nobody's answer depends on it
                self._stats.num_steps_in_vain += begun.step.wait() is not None

    def abandon(self, running: Running | None) -> None:
        """Wait for the end of everything that was begun, whatever it is."""
        self.drop()
        if running is not None:
            with suppress(Exception):  # the first one is reported
                running.step.wait()

    def guess(
        self, plan: Plan, state: SchedulerState, sequences: Mapping[int, Sequence], most: int
    ) -> bool:
        """Guess what follows a plan that is about to run; False: nobody knows. most: model length.

        Known are sequences that decode, do not end by their length with this step, and whose
        sampling does not depend on the token that the step is about to sample.
        """
        assert self._guess is None and self._begun is None
        if plan.num_decodes != len(plan.chunks) or plan.num_tokens != plan.num_rows:
            return False
        if self._executor.overlap == "measured" and not self._governor.wants(len(plan.chunks)):
            return False
        states = [state.sequences[chunk[0]] for chunk in plan.chunks]
        for chunk, known in zip(plan.chunks, states):
            sequence = sequences[chunk[0]]
            after = len(sequence.tokens) + 1
            if after >= sequence.most_tokens or after >= most or not sequence.is_foreseeable:
                return False
            if known.all_rows or not known.samples or _leaves_window(chunk, state):
                return False
        new_pages = _next_pages(plan.chunks, states, state)
        if new_pages is None:
            return False
        chunks = [Chunk(c[0], c[1] + 1, 1, 1, 0) for c in plan.chunks]
        self._guess = _Guess(chunks, states, [s.page_epoch for s in states], new_pages)
        return True

    def begin_guess(self, sequences: Mapping[int, Sequence]) -> None:
        """Begin the step of the guess, behind the one that runs."""
        guess = self._guess
        assert guess is not None
        batch = self._builders[self._turn ^ 1].build_next(
            [sequences[chunk[0]] for chunk in guess.chunks],
            guess.states,
            [chunk[1] for chunk in guess.chunks],
            guess.new_pages,
        )
        sources = self._rows[: len(guess.chunks)]
        if batch.num_tokens > len(sources):  # padding is known
            sources = np.full(batch.num_tokens, -1, np.int64)
            sources[: len(guess.chunks)] = self._rows[: len(guess.chunks)]
        self._begun = Running(batch, self._executor.begin(batch, sources, self._hold))


def _next_pages(
    chunks: list[Chunk], states: list[SequenceState], state: SchedulerState
) -> dict[int, int] | None:
    """Return the pages that the sequences will get for their next token; None: not known.

    They come from the top of the free pages, in the order of the chunks.
    """
    pool, size = state.pool, state.limits.page_size
    found: dict[int, int] = {}
    for row, (chunk, known) in enumerate(zip(chunks, states)):
        index = (chunk[1] + 1) // size
        if index < len(known.pages):
            page = known.pages[index]
            if pool.is_shared(page) or pool.is_indexed(page):
                return None
        elif len(found) < len(pool.free) and index < state.limits.max_pages_per_sequence:
            found[row] = pool.free[-1 - len(found)]
        else:
            return None
    return found


def _leaves_window(chunk: Chunk, state: SchedulerState) -> bool:
    """Return whether a page may leave the window when the chunk is committed."""
    window = state.options.window_tokens
    if window is None:
        return False
    computed, size = chunk[1] + 1, state.limits.page_size
    return computed >= window and (computed - window + 1) % size == 0


def _is(plan: Plan, guess: _Guess, states: Mapping[int, SequenceState]) -> bool:
    """Return whether a plan is what was guessed, with the same pages and no page moves."""
    if plan.chunks != guess.chunks or plan.copies or plan.swap_ins or plan.swap_outs:
        return False
    if any(
        state.page_epoch != epoch or states.get(state.sequence_id) is not state
        for state, epoch in zip(guess.states, guess.epochs)
    ):
        return False
    return all(guess.states[row].pages[-1] == page for row, page in guess.new_pages.items())
