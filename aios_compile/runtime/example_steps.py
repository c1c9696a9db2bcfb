"""Batches of equal sequences, as a running engine makes them: for measuring, not for serving."""

from __future__ import annotations

import numpy as np

from aios_compile.runtime.batch import Batch, Limits


def pages_of(limits: Limits, sequences: int, context: int, new: int = 1) -> int:
    """Return the pages, the trash page included, that `equal_sequences` names."""
    first, own = _pages(limits, context, new)
    return 1 + first + sequences * own


def equal_sequences(
    limits: Limits, sequences: int, context: int, new: int = 1, seed: int = 0
) -> Batch:
    """Return a greedy step of `new` tokens of each sequence, `context` tokens long with them.

    Pages that the step only reads are shared, those that it writes are each sequence's own, so that
    its results do not depend on who writes first. Beyond num_pages they come around again: good
    for times alone.
    """
    page, tokens = limits.page_size, sequences * new
    first, own = _pages(limits, context, new)
    tables = np.zeros((sequences, limits.max_pages_per_sequence), np.int64)
    tables[:, :first] = 1 + np.arange(first) % (limits.num_pages - 1)
    written = 1 + first + np.arange(sequences * own).reshape(sequences, own)
    tables[:, first : first + own] = 1 + (written - 1) % (limits.num_pages - 1)
    positions = np.tile(np.arange(context - new, context), sequences)
    owner = np.repeat(np.arange(sequences), new)
    zeros, ones = np.zeros(sequences, np.int64), np.ones(sequences, np.float32)
    starts, none = np.zeros(sequences + 1, np.int64), np.zeros(0, np.int64)
    return Batch(
        token_ids=np.random.default_rng(seed).integers(0, limits.vocab_size, tokens),
        positions=positions, sequence_lengths=positions + 1,
        slots=tables[owner, positions // page] * page + positions % page,
        query_starts=np.arange(sequences + 1) * new, context_lengths=zeros + context,
        page_tables=tables, logit_rows=np.arange(1, sequences + 1) * new - 1,
        temperature=0 * ones, top_k=zeros, top_p=ones, min_p=0 * ones, seeds=zeros,
        sample_positions=zeros + context, repetition_penalty=ones, presence_penalty=0 * ones,
        frequency_penalty=0 * ones, penalty_starts=starts, penalty_ids=none, penalty_counts=none,
        bias_starts=starts, bias_ids=none, bias_values=np.zeros(0, np.float32),
        allowed_starts=starts, allowed_ids=none, logprob_counts=zeros, given_ids=zeros,
        has_given=zeros,
    )  # fmt: skip


def _pages(limits: Limits, context: int, new: int) -> tuple[int, int]:
    """Return how many pages a step only reads, and how many of a sequence it writes to."""
    first = (context - new) // limits.page_size
    return first, -(-context // limits.page_size) - first
