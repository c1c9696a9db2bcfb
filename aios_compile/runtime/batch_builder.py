"""From a plan to the arrays of one step, in buffers that are allocated once.

tokens    | seq A: 1 | seq B: 1 | seq C: a chunk of 5 | padding to the bucket: page 0 |
query_starts 0          1          2                     7  (= T without the padding)
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np

from aios_compile.runtime.batch import TRASH_PAGE, Batch, Ints, Limits
from aios_compile.runtime.request import Sequence
from aios_compile.runtime.sampling_rows import PromptRows, SampledRow, SamplingRows
from aios_compile.runtime.schedule_state import Chunk, Plan, SequenceState

LEAST_STEADY = 4
_NO_DRAFTS: Mapping[int, Seq[int]] = {}


class BatchBuilder:
    """Owner of every input buffer. A batch is valid until the next `build`."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        tokens = limits.padded_tokens(limits.max_num_batched_tokens)
        self._token_ids, self._positions, self._lengths, self._slots = (
            np.zeros(tokens, np.int64) for _ in range(4)
        )
        self._query_starts = np.zeros(limits.max_num_seqs + 1, np.int64)
        self._context_lengths = np.zeros(limits.max_num_seqs, np.int64)
        self._page_tables = np.zeros((limits.max_num_seqs, limits.max_pages_per_sequence), np.int64)
        self._table_keys: list[tuple[int, int, int]] = [(-1, 0, 0)] * limits.max_num_seqs
        self._logit_rows = np.zeros(limits.max_num_logit_rows, np.int64)
        self._rows = SamplingRows(limits)
        self._counting: Ints = np.arange(max(limits.max_model_len, tokens), dtype=np.int64)
        self._batch: Batch | None = None
        self._steady: _Steady | None = None  # of the last batch, if it was decodes alone

    def build(
        self,
        plan: Plan,
        sequences: Mapping[int, Sequence],
        states: Mapping[int, SequenceState],
        drafts: Mapping[int, Seq[int]] = _NO_DRAFTS,
    ) -> Batch:
        """Return the batch of a plan; tokens, positions, pages and sampling rows as of now.

        drafts: by sequence id at least as many tokens as its chunk verifies.
        """
        num, steady = len(plan.chunks), self._steady
        is_plain = steady is not None and plan.num_tokens == plan.num_rows == num
        if is_plain and steady and steady.ids == [chunk[0] for chunk in plan.chunks]:
            return self._build_steady(steady, plan)
        token, row = 0, 0
        sampled: list[SampledRow] = []
        prompts: list[PromptRows] = []
        for s, chunk in enumerate(plan.chunks):
            sequence, state = sequences[chunk.sequence_id], states[chunk.sequence_id]
            self._write_page_table(s, state)
            if chunk.num_tokens == 1:
                self._write_token(token, chunk.start, sequence, state)
            else:
                self._write_chunk(token, s, chunk, sequence)
            ahead = drafts[chunk.sequence_id] if chunk.num_drafts else ()
            token += chunk.num_tokens
            end = chunk.start + chunk.num_tokens
            self._query_starts[s + 1] = token
            self._context_lengths[s] = end
            samples = state.samples and end - chunk.num_drafts == state.num_tokens
            count = chunk.num_rows - samples - chunk.num_drafts
            if count:
                first = max(chunk.start, state.num_rows_done)
                prompts.append(PromptRows(row, count, first, sequence))
                place = token - end + first
                self._logit_rows[row : row + count] = np.arange(place, place + count)
            if samples:
                self._logit_rows[row + count] = token - 1 - chunk.num_drafts
                sampled.append(SampledRow(row + count, sequence))
            for i in range(chunk.num_drafts):
                self._token_ids[token - chunk.num_drafts + i] = ahead[i]
                self._logit_rows[row + count + 1 + i] = token - chunk.num_drafts + i
                sampled.append(SampledRow(row + count + 1 + i, sequence, ahead[: i + 1]))
            row += chunk.num_rows
        assert token == plan.num_tokens and row == plan.num_rows, "the plan's sums are wrong"
        padded = token if self.limits.unfolds else self.limits.padded_tokens(token)
        if padded > token:
            self._pad(token, padded)
        self._rows.write(sampled, prompts)
        self._steady = None
        if plan.num_decodes == plan.num_tokens == len(sampled) == num:
            self._steady = _Steady.of(sampled, [states[c.sequence_id] for c in plan.chunks])
        return self._views(padded, num, row)

    def build_next(
        self,
        sequences: Seq[Sequence],
        states: Seq[SequenceState],
        starts: Seq[int],
        new_pages: Mapping[int, int],
    ) -> Batch:
        """Return the batch of one decode each, before the tokens at `starts` are known: 0.

        new_pages: by row the page that its sequence does not have yet. The rows are plain: nothing
        about their sampling depends on the tokens that are not known.
        """
        ids = [state.sequence_id for state in states]
        if self._steady is None or self._steady.ids != ids:
            self._steady = self._settle(sequences, states)
        self._token_ids[: len(ids)] = 0
        return self._move_on(self._steady, starts, new_pages)

    def _settle(self, sequences: Seq[Sequence], states: Seq[SequenceState]) -> _Steady:
        """Write what a batch of one sampled token a sequence keeps as it moves on."""
        num = len(states)
        rows = [SampledRow(i, sequence) for i, sequence in enumerate(sequences)]
        for s, state in enumerate(states):
            self._write_page_table(s, state)
        self._query_starts[: num + 1] = self._counting[: num + 1]
        self._logit_rows[:num] = self._counting[:num]
        padded = num if self.limits.unfolds else self.limits.padded_tokens(num)
        self._pad(num, padded)
        self._rows.write(rows, [])
        self._views(padded, num, num)
        return _Steady(rows, list(states))

    def _build_steady(self, steady: _Steady, plan: Plan) -> Batch:
        """Return the batch of the same sequences one token later: a few arrays at once.

        Row i is still chunk i, and padding, query starts and logit rows are as they were.
        """
        starts = [chunk[1] for chunk in plan.chunks]
        pairs = zip(steady.sequences, starts)
        self._token_ids[: len(starts)] = [sequence.tokens[start] for sequence, start in pairs]
        return self._move_on(steady, starts, {})

    def _move_on(self, steady: _Steady, starts: Seq[int], new_pages: Mapping[int, int]) -> Batch:
        num, size = len(starts), self.limits.page_size
        places = self._context_lengths[:num]  # until 1 is added
        places[:] = starts
        marks = [(state.page_epoch, len(state.pages)) for state in steady.states]
        if marks != steady.marks:
            steady.marks = marks
            for s, state in enumerate(steady.states):
                self._write_page_table(s, state)
        for s, page in new_pages.items():
            self._page_tables[s, starts[s] // size] = page
        if not self.limits.unfolds:
            self._positions[:num] = places
            pages, offsets = np.divmod(places, size)
            slots = self._slots[:num]
            np.multiply(self._page_tables[self._counting[:num], pages], size, out=slots)
            slots += offsets
        places += 1
        np.maximum(places, steady.num_prompt_tokens, out=self._lengths[:num])
        self._rows.move_on(steady.rows, places)
        return self._views(self._batch.num_tokens if self._batch else num, num, num)

    def _write_page_table(self, s: int, state: SequenceState) -> None:
        key = (state.sequence_id, state.page_epoch, len(state.pages))
        old = self._table_keys[s]
        if key == old:
            return
        if key[:2] == old[:2]:  # the same sequence got more pages
            self._page_tables[s, old[2] : key[2]] = state.pages[old[2] :]
        else:
            self._page_tables[s, : key[2]] = state.pages
            self._page_tables[s, key[2] :] = TRASH_PAGE
        self._table_keys[s] = key

    def _write_token(
        self, token: int, position: int, sequence: Sequence, state: SequenceState
    ) -> None:
        self._token_ids[token] = sequence.tokens[position]
        self._lengths[token] = max(sequence.num_prompt_tokens, position + 1)
        if self.limits.unfolds:
            return
        page, offset = divmod(position, self.limits.page_size)
        self._positions[token] = position
        self._slots[token] = state.pages[page] * self.limits.page_size + offset

    def _write_chunk(self, token: int, s: int, chunk: Chunk, sequence: Sequence) -> None:
        here = slice(token, token + chunk.num_tokens)
        end = chunk.start + chunk.num_tokens
        positions = self._counting[chunk.start : end]
        known = end - chunk.num_drafts
        self._token_ids[token : token + known - chunk.start] = sequence.tokens[chunk.start : known]
        self._lengths[token] = max(sequence.num_prompt_tokens, chunk.start + 1)
        if self.limits.unfolds:
            return
        self._positions[here] = positions
        np.maximum(positions + 1, sequence.num_prompt_tokens, out=self._lengths[here])
        size = self.limits.page_size
        self._slots[here] = self._page_tables[s][positions // size] * size + positions % size

    def _pad(self, start: int, end: int) -> None:
        """Fill [start, end): token 0 at position 0, written to the trash page."""
        self._token_ids[start:end] = 0
        self._positions[start:end] = 0
        self._lengths[start:end] = 1
        size = self.limits.page_size
        self._slots[start:end] = TRASH_PAGE * size + self._counting[: end - start] % size

    def _views(self, num_tokens: int, num_sequences: int, num_rows: int) -> Batch:
        """Return views of the buffers; the last batch again when no size has changed."""
        rows, batch = self._rows, self._batch
        if batch is None or (batch.num_tokens, batch.num_sequences, batch.num_rows) != (
            num_tokens,
            num_sequences,
            num_rows,
        ):
            T, S, R = num_tokens, num_sequences, num_rows
            self._batch = batch = Batch(
                token_ids=self._token_ids[:T],
                positions=self._positions[:T],
                sequence_lengths=self._lengths[:T],
                slots=self._slots[:T],
                query_starts=self._query_starts[: S + 1],
                context_lengths=self._context_lengths[:S],
                page_tables=self._page_tables[:S],
                logit_rows=self._logit_rows[:R],
                temperature=rows.temperature[:R],
                top_k=rows.top_k[:R],
                top_p=rows.top_p[:R],
                min_p=rows.min_p[:R],
                seeds=rows.seeds[:R],
                sample_positions=rows.positions[:R],
                repetition_penalty=rows.repetition[:R],
                presence_penalty=rows.presence[:R],
                frequency_penalty=rows.frequency[:R],
                penalty_starts=rows.penalties.starts(R),
                penalty_ids=rows.penalties.columns[0],
                penalty_counts=rows.penalties.columns[1],
                bias_starts=rows.bias.starts(R),
                bias_ids=rows.bias.columns[0],
                bias_values=rows.bias.columns[1],
                allowed_starts=rows.allowed.starts(R),
                allowed_ids=rows.allowed.columns[0],
                logprob_counts=rows.logprob_counts[:R],
                given_ids=rows.given[:R],
                has_given=rows.has_given[:R],
            )
            return batch
        batch.penalty_ids, batch.penalty_counts = rows.penalties.columns
        batch.bias_ids, batch.bias_values = rows.bias.columns
        (batch.allowed_ids,) = rows.allowed.columns
        return batch


class _Steady:
    """A batch of one sampled token a sequence: as long as nobody joins or leaves, it only moves."""

    def __init__(self, rows: list[SampledRow], states: list[SequenceState]) -> None:
        self.rows = rows
        self.states = states
        self.sequences = [row.sequence for row in rows]
        self.ids = [state.sequence_id for state in states]
        self.marks = [(state.page_epoch, len(state.pages)) for state in states]
        self.num_prompt_tokens = np.array([s.num_prompt_tokens for s in self.sequences], np.int64)

    @classmethod
    def of(cls, rows: list[SampledRow], states: list[SequenceState]) -> _Steady | None:
        """Return it, None if a row could be another one than the sampled one next time.

        None also for so few that one after the other is quicker.
        """
        if len(rows) < LEAST_STEADY or any(state.all_rows for state in states):
            return None
        return cls(rows, states)
