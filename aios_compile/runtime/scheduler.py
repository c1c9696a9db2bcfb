"""Continuous batching as a pure function: (state, event, now) -> (state, plan).

No clock, no tensors, no randomness (nothing is drawn, so no seed either): the same events give the
same decisions, which is what `replay` checks. One step takes, under the limits on tokens, rows and
sequences:

1. one token of every running sequence that has one left (decodes), oldest first;
2. chunks of the prompts that are running, oldest first;
3. new sequences in order of arrival, if the pages of all their tokens are free.

When a decode finds no page, the sequence that arrived last gives all of its pages back and is
computed again later. Sampling is seeded by (request, position), so nobody sees it. Progress: the
oldest sequence is never preempted while another one holds a page, and admission has checked that it
fits alone. The policy is vLLM's first-come-first-served with recompute.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from aios_compile.runtime.batch import Limits
from aios_compile.runtime.decisions import Decision
from aios_compile.runtime.schedule_state import (
    Abort,
    Arrive,
    Chunk,
    Commit,
    Event,
    Plan,
    Schedule,
    SchedulerState,
    SequenceState,
    event_from_record,
)

_ORDER = attrgetter("sequence_id")


def transition(state: SchedulerState, event: Event, now_us: int) -> tuple[SchedulerState, Plan]:
    """Return the next state and the plan; `state` stays as it was."""
    following = state.copy()
    return following, advance(following, event, now_us)


def advance(state: SchedulerState, event: Event, now_us: int) -> Plan:
    """Do the same in place, for the owner of the state. Only Schedule plans chunks and copies."""
    step = _Step(state, now_us)
    if isinstance(event, Schedule):
        step.schedule()
    elif isinstance(event, Commit):
        step.commit(event)
    elif isinstance(event, Arrive):
        step.arrive(event)
    elif isinstance(event, Abort):
        step.abort(event)
    else:
        assert state.in_flight is None, "pages of a running step cannot be given away"
        step.preempt(state.sequences[event.sequence_id], "asked for")
    return step.plan


def replay(limits: Limits, records: Iterable[dict[str, Any]]) -> list[Decision]:
    """Make the decisions of logged events again, from an empty state."""
    state = SchedulerState.empty(limits)
    decisions: list[Decision] = []
    for record in records:
        decisions += advance(state, *event_from_record(record)).decisions
    return decisions


class _Step:
    """One event being handled: the state that it changes and the plan that it fills."""

    def __init__(self, state: SchedulerState, now_us: int) -> None:
        self.state = state
        self.now_us = now_us
        self.plan = Plan()

    # ---- events

    def arrive(self, event: Arrive) -> None:
        first = event.sequence_id
        for i in range(event.num_sequences):
            sequence = SequenceState(
                sequence_id=first + i,
                request_id=event.request_id,
                num_prompt_tokens=event.num_prompt_tokens,
                num_tokens=event.num_prompt_tokens,
                all_rows=event.all_rows and i == 0,
                samples=event.samples,
                forks_from=first if i else None,
            )
            assert first + i not in self.state.sequences
            self.state.sequences[first + i] = sequence
            insort(self.state.waiting, sequence, key=_ORDER)
        ids = tuple(range(first, first + event.num_sequences))
        if event.num_sequences > 1:
            self.state.siblings[first] = list(ids[1:])
        self._log("arrive", ids, "admission passed", prompt_tokens=event.num_prompt_tokens)

    def abort(self, event: Abort) -> None:
        assert self.state.in_flight is None, "pages of a running step cannot be given away"
        found = [s for s in self.state.sequences.values() if s.request_id == event.request_id]
        for sequence in found:
            self._remove(sequence)
        if found:
            self._log("abort", tuple(s.sequence_id for s in found), "the caller asked for it")

    def commit(self, event: Commit) -> None:
        plan, self.state.in_flight = self.state.in_flight, None
        assert plan is not None, "a commit without a step in flight"
        finished = dict(event.finished)
        for chunk in plan.chunks:
            sequence = self.state.sequences[chunk.sequence_id]
            end = chunk.start + chunk.num_tokens
            sequence.num_computed = end
            if sequence.all_rows:
                rows = min(end, sequence.num_prompt_rows)
                sequence.num_rows_done = max(sequence.num_rows_done, rows)
            if sequence.samples and end == sequence.num_tokens:
                sequence.num_tokens += chunk.sequence_id not in finished
            if end >= sequence.num_prompt_tokens and chunk.sequence_id in self.state.siblings:
                self._fork(sequence)
        for sequence_id, reason in event.finished:
            self._remove(self.state.sequences[sequence_id])
            self._log("finish", (sequence_id,), reason)

    def schedule(self) -> None:
        state = self.state
        assert state.in_flight is None, "the step before has not been committed"
        self._decodes()
        self._running_prompts()
        if not self.plan.preempted:  # no newcomer while pages are short
            self._admissions()
        if self.plan.chunks:
            state.in_flight = self.plan
            state.step += 1

    # ---- the three parts of a step

    def _decodes(self) -> None:
        ids = []
        for sequence in list(self.state.running):
            if not sequence.running or sequence.num_tokens - sequence.num_computed != 1:
                continue  # preempted just now, or a prompt
            if self._make_room(sequence):
                self._add_chunk(sequence, 1)
                ids.append(sequence.sequence_id)
        if ids:
            self._log("decode", tuple(ids), "running")

    def _running_prompts(self) -> None:
        for sequence in self.state.running:
            if sequence.num_tokens - sequence.num_computed > 1:
                self._add_prompt_chunk(sequence)

    def _admissions(self) -> None:
        state, limits, pool = self.state, self.state.limits, self.state.pool
        place = 0
        while place < len(state.waiting):
            sequence = state.waiting[place]
            if sequence.forks_from is not None:
                place += 1  # its prompt is being computed by another one; it holds nobody up
                continue
            if not self._fits_batch(sequence):
                break
            need = self._pages_needed(sequence)
            if not state.running:
                self._drop_waiting_holders(sequence, need)
                need = self._pages_needed(sequence)
                assert pool.num_free >= need, "admission let in a sequence that never fits"
            elif pool.num_free < need + len(state.running):  # each running one may need a page soon
                self._wait(sequence, "pages", need=need, free=pool.num_free)
                break
            self._own_page_of(sequence, sequence.num_computed)
            total = -(-sequence.num_tokens // limits.page_size)
            while len(sequence.pages) < total:
                sequence.pages.append(pool.allocate())
            del state.waiting[place]
            sequence.running = True
            insort(state.running, sequence, key=_ORDER)
            self._log("admit", (sequence.sequence_id,), "first in the queue", pages=total)
            self._add_prompt_chunk(sequence)

    # ---- helpers

    def _fits_batch(self, sequence: SequenceState) -> bool:
        limits = self.state.limits
        if len(self.state.running) >= limits.max_running:
            self._wait(sequence, "max_num_seqs", running=len(self.state.running))
        elif self._chunk_size(sequence) == 0:
            self._wait(sequence, "token or row budget", tokens=self.plan.num_tokens)
        else:
            return True
        return False

    def _chunk_size(self, sequence: SequenceState) -> int:
        """Return how many of the sequence's next tokens the budgets of this step still take."""
        limits, start = self.state.limits, sequence.num_computed
        rows_left = limits.max_num_logit_rows - self.plan.num_rows
        end = min(sequence.num_tokens, start + limits.max_num_batched_tokens - self.plan.num_tokens)
        if sequence.num_rows_done < sequence.num_prompt_rows:
            end = min(end, max(start, sequence.num_rows_done) + rows_left)
        if sequence.num_rows(start, end) > rows_left:  # the sampled row does not fit any more
            end -= 1
        return max(0, end - start)

    def _add_prompt_chunk(self, sequence: SequenceState) -> None:
        size = self._chunk_size(sequence)
        if size:
            left = sequence.num_tokens - sequence.num_computed - size
            reason = "cut by the budget of tokens or rows" if left else "to the last token"
            ids = (sequence.sequence_id,)
            self._log("chunk", ids, reason, start=sequence.num_computed, tokens=size)
            self._add_chunk(sequence, size)

    def _add_chunk(self, sequence: SequenceState, size: int) -> None:
        start = sequence.num_computed
        rows = sequence.num_rows(start, start + size)
        self.plan.chunks.append(Chunk(sequence.sequence_id, start, size, rows))
        self.plan.num_tokens += size
        self.plan.num_rows += rows

    def _pages_needed(self, sequence: SequenceState) -> int:
        """Return the free pages that all known tokens need, a copy of a shared page included."""
        page_size = self.state.limits.page_size
        index = sequence.num_computed // page_size
        shared = index < len(sequence.pages) and self.state.pool.is_shared(sequence.pages[index])
        return -(-sequence.num_tokens // page_size) - len(sequence.pages) + shared

    def _make_room(self, sequence: SequenceState) -> bool:
        """Let the sequence own the page of its next token; False if it had to give up itself."""
        pool, page_size = self.state.pool, self.state.limits.page_size
        index = sequence.num_computed // page_size
        while index == len(sequence.pages) or pool.is_shared(sequence.pages[index]):
            if pool.num_free:
                if index == len(sequence.pages):
                    sequence.pages.append(pool.allocate())
                else:
                    self._own_page_of(sequence, sequence.num_computed)
                return True
            victim = self._latest_holder()
            self.preempt(victim, f"sequence {sequence.sequence_id} needs a page")
            if victim is sequence:
                return False
        return True

    def _own_page_of(self, sequence: SequenceState, position: int) -> None:
        """Copy the page of a position before it is written, if others read it too."""
        pool, index = self.state.pool, position // self.state.limits.page_size
        if index >= len(sequence.pages) or not pool.is_shared(sequence.pages[index]):
            return
        source, target = sequence.pages[index], pool.allocate()
        pool.release([source])
        sequence.pages[index] = target
        sequence.page_epoch += 1
        self.plan.copies.append((source, target))
        reason = "written while shared"
        self._log("copy", (sequence.sequence_id,), reason, source=source, target=target)

    def _fork(self, leader: SequenceState) -> None:
        """Give the leader's prompt pages to its siblings, which compute only the last token again.

        They sample from their own row then, on the same path as every decode.
        """
        shared_tokens = leader.num_prompt_tokens - 1
        pages = leader.pages[: -(-shared_tokens // self.state.limits.page_size)]
        siblings = self.state.siblings.pop(leader.sequence_id)
        for sibling in (self.state.sequences[i] for i in siblings):
            self.state.pool.share(pages)
            sibling.pages = list(pages)
            sibling.page_epoch += 1
            sibling.num_computed = shared_tokens
            sibling.forks_from = None
        self._log("fork", tuple(siblings), "the shared prompt is computed", pages=len(pages))

    def _latest_holder(self) -> SequenceState:
        holders = [s for s in self.state.waiting if s.pages]
        return max(self.state.running[-1:] + holders[-1:], key=_ORDER)

    def _drop_waiting_holders(self, sequence: SequenceState, need: int) -> None:
        for other in reversed(self.state.waiting):
            if self.state.pool.num_free >= need or other is sequence:
                return
            if other.pages:
                self.preempt(other, f"sequence {sequence.sequence_id} is first in the queue")
                need = self._pages_needed(sequence)

    def preempt(self, sequence: SequenceState, reason: str) -> None:
        """Take all pages back. Never one that this step has planned: victims are later ones."""
        freed = len(sequence.pages)
        self._release(sequence)
        if sequence.running:
            sequence.running = False
            self.state.running.remove(sequence)
            insort(self.state.waiting, sequence, key=_ORDER)
        self.plan.preempted.append(sequence.sequence_id)
        self._log("preempt", (sequence.sequence_id,), reason, pages=freed)

    def _release(self, sequence: SequenceState) -> None:
        self.state.pool.release(sequence.pages)
        sequence.pages = []
        sequence.page_epoch += 1
        sequence.num_computed = 0

    def _remove(self, sequence: SequenceState) -> None:
        self._release(sequence)
        (self.state.running if sequence.running else self.state.waiting).remove(sequence)
        del self.state.sequences[sequence.sequence_id]
        for sibling in self.state.siblings.pop(sequence.sequence_id, ()):
            if sibling in self.state.sequences:  # they compute the prompt on their own
                self.state.sequences[sibling].forks_from = None
        if sequence.forks_from is not None:
            self.state.siblings[sequence.forks_from].remove(sequence.sequence_id)

    def _wait(self, sequence: SequenceState, reason: str, **detail: int) -> None:
        if self.state.last_wait != (sequence.sequence_id, reason):
            self.state.last_wait = (sequence.sequence_id, reason)
            self._log("wait", (sequence.sequence_id,), reason, **detail)

    def _log(self, kind: str, sequences: tuple[int, ...], reason: str, **detail: int) -> None:
        step = self.state.step
        self.plan.decisions.append(Decision(step, self.now_us, kind, sequences, reason, detail))
