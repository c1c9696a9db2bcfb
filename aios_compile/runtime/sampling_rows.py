"""The sampling half of a batch: one row of parameters for each logit row.

Rows are rewritten only when the batch changes (who is in it, or a bias that changes as the output
grows); a decode step of an unchanged batch touches sample_positions and the penalty counts alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aios_compile.runtime.batch import Floats, Ints, Limits
from aios_compile.runtime.request import Sequence

_NO_IDS: Ints = np.zeros(0, np.int64)
_NO_VALUES: Floats = np.zeros(0, np.float32)


class SampledRow(NamedTuple):
    """Row `row` samples what follows the sequence's tokens and then `ahead`, drafts to verify."""

    row: int
    sequence: Sequence
    ahead: Seq[int] = ()


class RaggedRows:
    """Rows of different lengths as starts [R+1] and one flat array a column, in grown buffers."""

    def __init__(self, max_rows: int, dtypes: Seq[Any]) -> None:
        self._starts: Ints = np.zeros(max_rows + 1, np.int64)
        self._columns: list[NDArray[Any]] = [np.zeros(64, dtype) for dtype in dtypes]
        self._is_clear = True
        self.columns = [column[:0] for column in self._columns]  # new views only when filled

    def clear(self) -> None:
        """Make all rows empty."""
        if not self._is_clear:
            self._starts[:] = 0
            self.columns = [column[:0] for column in self._columns]
            self._is_clear = True

    def fill(self, *columns: Seq[NDArray[Any]]) -> None:
        """Write one array a row for each column; arrays of a row have one length."""
        lengths = [len(row) for row in columns[0]]
        total = sum(lengths)
        self._is_clear = False
        np.cumsum(lengths, out=self._starts[1 : len(lengths) + 1])
        for i, rows in enumerate(columns):
            if len(self._columns[i]) < total:
                self._columns[i] = np.zeros(2 * total, self._columns[i].dtype)
            if total:
                np.concatenate(rows, out=self._columns[i][:total])
        self.columns = [column[:total] for column in self._columns]

    def starts(self, num_rows: int) -> Ints:
        return self._starts[: num_rows + 1]


class SamplingRows:
    """Owner of the buffers of all sampling inputs. Row order is the order of `begin`'s chunks."""

    def __init__(self, limits: Limits) -> None:
        rows = limits.max_num_logit_rows
        self.temperature, self.top_p, self.min_p = (np.zeros(rows, np.float32) for _ in range(3))
        self.repetition, self.presence, self.frequency = (
            np.zeros(rows, np.float32) for _ in range(3)
        )
        self.top_k, self.seeds, self.positions, self.logprob_counts, self.given, self.has_given = (
            np.zeros(rows, np.int64) for _ in range(6)
        )
        self.penalties = RaggedRows(rows, (np.int64, np.int64))
        self.bias = RaggedRows(rows, (np.int64, np.float32))
        self.allowed = RaggedRows(rows, (np.int64,))
        self._key: list[int] | None = None  # sequence ids of the rows, if all of them are sampled
        self._changing_bias = False
        self._has_penalties = False

    def write(self, sampled: list[SampledRow], prompts: list[PromptRows]) -> None:
        """Write all rows: `sampled`, and `prompts`, the ranges in between."""
        positions = self.positions
        for row, sequence, ahead in sampled:
            positions[row] = len(sequence.tokens) + len(ahead)
        key = None if prompts else [sequence.sequence_id for _, sequence, _ in sampled]
        changed = key is None or key != self._key
        if changed:
            self._key = key
            for rows in prompts:
                self._write_prompt_rows(rows)
            for row, sequence, _ in sampled:
                self._write_sampled_row(row, sequence)
            self._changing_bias = any(s.has_changing_bias for _, s, _ in sampled)
            self._has_penalties = any(s.penalties is not None for _, s, _ in sampled)
        if not (changed or self._changing_bias or self._has_penalties):
            return
        owners: list[SampledRow | None] = [None] * (len(sampled) + sum(p.count for p in prompts))
        for item in sampled:
            owners[item.row] = item
        if changed or self._has_penalties:
            self._write_penalties(owners)
        if changed or self._changing_bias:
            self._write_bias(owners)
        if changed:
            self._write_allowed(owners)

    def move_on(self, sampled: list[SampledRow], positions: Ints) -> None:
        """Write the rows of `sampled` again, without drafts, after one more token of each."""
        self.positions[: len(positions)] = positions
        if self._changing_bias or self._has_penalties:
            self.write(sampled, [])

    def _write_sampled_row(self, row: int, sequence: Sequence) -> None:
        params = sequence.admitted.params
        self.temperature[row] = params.temperature
        self.top_p[row] = params.top_p
        self.top_k[row] = params.top_k
        self.min_p[row] = params.min_p
        self.repetition[row] = params.repetition_penalty
        self.presence[row] = params.presence_penalty
        self.frequency[row] = params.frequency_penalty
        self.seeds[row] = sequence.seed
        self.logprob_counts[row] = params.logprobs or 0
        self.given[row] = 0
        self.has_given[row] = 0

    def _write_prompt_rows(self, rows: PromptRows) -> None:
        here = slice(rows.row, rows.row + rows.count)
        for column in (self.temperature, self.min_p, self.presence, self.frequency):
            column[here] = 0
        self.top_p[here] = self.repetition[here] = 1
        self.top_k[here] = self.seeds[here] = 0
        self.has_given[here] = 1
        first = rows.position + 1  # the row of position p tells about the token at p + 1
        self.positions[here] = np.arange(first, first + rows.count)
        admitted = rows.sequence.admitted
        self.logprob_counts[here] = admitted.params.prompt_logprobs or 0
        tokens = rows.sequence.tokens[first : first + rows.count]
        self.given[here] = 0 if admitted.wants_logits else tokens

    def _write_penalties(self, owners: list[SampledRow | None]) -> None:
        pairs = [_counts_of(owner) for owner in owners]
        if any(len(ids) for ids, _ in pairs):
            self.penalties.fill([ids for ids, _ in pairs], [counts for _, counts in pairs])
        else:
            self.penalties.clear()

    def _write_bias(self, owners: list[SampledRow | None]) -> None:
        pairs = [
            (_NO_IDS, _NO_VALUES) if owner is None else _bias_of(owner.sequence, owner.ahead)
            for owner in owners
        ]
        if any(len(ids) for ids, _ in pairs):
            self.bias.fill([ids for ids, _ in pairs], [values for _, values in pairs])
        else:
            self.bias.clear()

    def _write_allowed(self, owners: list[SampledRow | None]) -> None:
        rows = [
            _NO_IDS if owner is None else owner.sequence.admitted.allowed_ids for owner in owners
        ]
        if any(len(ids) for ids in rows):
            self.allowed.fill(rows)
        else:
            self.allowed.clear()


class PromptRows:
    """Rows row..row+count of one chunk: prompt positions from `position` on, nothing is sampled."""

    __slots__ = ("count", "position", "row", "sequence")

    def __init__(self, row: int, count: int, position: int, sequence: Sequence) -> None:
        self.row, self.count, self.position, self.sequence = row, count, position, sequence


def _counts_of(owner: SampledRow | None) -> tuple[Ints, Ints]:
    if owner is None or owner.sequence.penalties is None:
        return _NO_IDS, _NO_IDS
    penalties = owner.sequence.penalties
    return penalties.with_ahead(owner.ahead) if owner.ahead else (penalties.ids, penalties.counts)


def _bias_of(sequence: Sequence, ahead: Seq[int]) -> tuple[Ints, Floats]:
    """Return the bias of the next token: logit_bias, bans below min_tokens, ends of bad words."""
    admitted = sequence.admitted
    num_output = sequence.num_output_tokens + len(ahead)
    if num_output < admitted.params.min_tokens:
        ids, values = admitted.early_bias_ids, admitted.early_bias_values
    else:
        ids, values = admitted.bias_ids, admitted.bias_values
    if not admitted.bad_words:
        return ids, values
    longest = max(len(word) for word in admitted.bad_words) - 1
    last = tuple(sequence.tokens[-longest:] if longest else ()) + tuple(ahead)
    ends = {
        word[-1]
        for word in admitted.bad_words
        if len(word) - 1 <= num_output and last[len(last) - len(word) + 1 :] == word[:-1]
    }
    if not ends:
        return ids, values
    banned = np.array(sorted(ends), np.int64)
    bans = np.full(len(banned), -np.inf, np.float32)
    other = np.isin(ids, banned, invert=True)  # ids are unique in a row
    return np.concatenate([ids[other], banned]), np.concatenate([values[other], bans])
