"""The host's half of a step's packet: a batch as one run of words in pinned memory.

The words are codegen/step_packet.py's. Two writers take turns (staging.py): one packet may still be
on its way to the device while the next is written.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.step_packet import (
    COUNTS,
    HEADER,
    LISTS,
    ROW_INPUTS,
    WORDS,
    header_word,
)
from aios_compile.runtime.batch import Batch, Ints
from aios_compile.runtime.device import Bytes

MOST = 2**31 - 1  # a request's top_k has no bound of its own
Words = NDArray[np.int32]


class PacketWriter:
    """Writes packets into `host`, bytes that the device copies from. page_size: tokens."""

    def __init__(self, host: Bytes, page_size: int) -> None:
        self.host = host
        self.words: Words = host[: len(host) // 4 * 4].view(np.int32)
        self._floats = self.words.view(np.float32)
        self._page_size = page_size
        self._used = HEADER

    @property
    def used(self) -> Bytes:
        """Return the bytes of the packet that was written last."""
        return self.host[: 4 * self._used]

    def fill(self, batch: Batch, sources: Ints | None = None) -> None:
        """Write the packet of a batch.

        sources: [T] the row of the step before that samples token i, -1 where token_ids has it.
        """
        sequences, rows, starts = batch.num_sequences, batch.num_rows, batch.query_starts
        tokens = int(starts[-1])  # without the padding that a builder may have added
        self._begin(tokens, sequences, rows)
        ids = batch.token_ids[:tokens]
        if sources is not None:
            ids = np.where(sources[:tokens] < 0, ids, -1 - sources[:tokens])
        self._add("token_ids", ids)
        self._add("query_starts", starts)
        self._add("context_lengths", batch.context_lengths)
        self._add("first_lengths", batch.sequence_lengths[starts[:-1]])
        self._add_pages(batch)
        for name in ROW_INPUTS:
            values = getattr(batch, name)
            self._add(name, np.minimum(values, MOST) if name == "top_k" else values)
        for names in LISTS.values():
            for name in names:
                self._add(name, getattr(batch, name))

    def fill_empty(self) -> None:
        """Write the packet of a batch of nothing: a step that changes only the trash page."""
        self._begin(0, 0, 0)
        zero = np.zeros(1, np.int64)
        for name in ("query_starts", "table_starts", *(names[0] for names in LISTS.values())):
            self._add(name, zero)

    def _begin(self, tokens: int, sequences: int, rows: int) -> None:
        self.words[:COUNTS] = tokens, sequences, rows
        self.words[COUNTS:HEADER] = 0
        self._used = HEADER

    def _add(self, section: str, values: NDArray[np.int64] | NDArray[np.float32]) -> None:
        """Write a section; 64-bit integers are cut to 32 bits, which hold all but seeds."""
        begin, count = self._used, len(values)
        self.words[header_word(section)] = begin
        if WORDS.get(section, 1) == 2:
            self.words[begin : begin + 2 * count] = values.view(np.int32)
            count *= 2
        elif values.dtype == np.float32:
            self._floats[begin : begin + count] = values
        else:
            self.words[begin : begin + count] = values
        self._used = begin + count

    def _add_pages(self, batch: Batch) -> None:
        """Write the pages that sequences use, one sequence behind the other."""
        used = -(-batch.context_lengths // self._page_size)
        starts = np.zeros(len(used) + 1, np.int64)
        np.cumsum(used, out=starts[1:])
        self._add("table_starts", starts)
        most = int(used.max(initial=0))
        tables = batch.page_tables[:, :most]
        self._add("pages", tables[np.arange(most) < used[:, None]])
