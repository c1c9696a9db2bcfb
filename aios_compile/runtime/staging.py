"""The inputs of a step on a device: a packet, sent in one copy, and where a kernel unfolds it.

The host writes what it alone knows (token ids, lengths, pages in use, sampling rows) as one run of
words (codegen/step_packet.py). The first kernel of a step makes the inputs from it, padding
included, at places that are fixed for the largest sizes, so that a captured graph finds them there.
The lists of the sampler (penalties, biases, allowed ids) grow; then both blocks move, and graphs
that were captured before are of no use (`moved` says so).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.operand import BYTES, dim_value
from aios_compile.codegen.program import TensorEntry
from aios_compile.codegen.step_packet import (
    COUNTS,
    HEADER,
    LISTS,
    ROW_INPUTS,
    WORDS,
    header_word,
    most_words,
)
from aios_compile.runtime.batch import Batch, Limits
from aios_compile.runtime.device import Device

ALIGNMENT = 256  # bytes: what a GPU's copy engine and 16-byte loads like
FIRST_LIST = 1024  # entries that a list holds before it grows
SIZE_NAMES = {"penalty": "NP", "bias": "NB", "allowed": "NA"}  # as in an input's shape
MOST = 2**31 - 1  # a request's top_k has no bound of its own
Words = NDArray[np.int32]


def place_inputs(
    inputs: Sequence[TensorEntry], limits: Limits, lists: dict[str, int]
) -> tuple[dict[str, int], int]:
    """Return where each input begins, in bytes, and the bytes of all.

    lists: entries that each list of the sampler has room for.
    """
    sizes = {
        "T": limits.padded_tokens(limits.max_num_batched_tokens),
        "S": limits.max_num_seqs,
        "R": limits.max_num_logit_rows,
        "P": limits.max_pages_per_sequence,
        **{SIZE_NAMES[kind]: size for kind, size in lists.items()},
    }
    offsets, end = {}, 0
    for entry in inputs:
        offsets[entry.name] = end
        size = int(np.prod([dim_value(d, sizes) for d in entry.shape])) * BYTES[entry.dtype]
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def packet_words(limits: Limits, lists: dict[str, int]) -> int:
    """Return the words of the largest packet."""
    tokens = limits.padded_tokens(limits.max_num_batched_tokens)
    pages = limits.max_num_seqs * limits.max_pages_per_sequence
    return most_words(tokens, limits.max_num_seqs, limits.max_num_logit_rows, pages, lists)


class Staging:
    """The inputs of a program on a device. `memory` is where kernels read them, at `offsets`;
    `packet` is what the first kernel reads."""

    def __init__(self, inputs: Sequence[TensorEntry], limits: Limits, device: Device) -> None:
        self.inputs, self.limits, self.device = inputs, limits, device
        self.lists = dict.fromkeys(LISTS, FIRST_LIST)
        self.moved = False
        self._used = HEADER
        self._place()

    def _place(self) -> None:
        """Lay the inputs out and allocate them, and the packet on both sides."""
        self.offsets, size = place_inputs(self.inputs, self.limits, self.lists)
        words = packet_words(self.limits, self.lists)
        self.staged = self.device.host_bytes(4 * words)
        self.words: Words = self.staged[: 4 * words].view(np.int32)
        self._floats = self.words.view(np.float32)
        self.packet = self.device.allocate(4 * words)
        self.memory = self.device.allocate(size)

    def fill(self, batch: Batch) -> None:
        """Write the packet of a batch."""
        self._grow(batch)
        sequences, rows, starts = batch.num_sequences, batch.num_rows, batch.query_starts
        tokens = int(starts[-1])  # without the padding that a builder may have added
        self._begin(tokens, sequences, rows)
        self._add("token_ids", batch.token_ids[:tokens])
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

    def _add(self, section: str, values: NDArray[Any]) -> None:
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
        used = -(-batch.context_lengths // self.limits.page_size)
        starts = np.zeros(len(used) + 1, np.int64)
        np.cumsum(used, out=starts[1:])
        self._add("table_starts", starts)
        most = int(used.max(initial=0))
        tables = batch.page_tables[:, :most]
        self._add("pages", tables[np.arange(most) < used[:, None]])

    def upload(self) -> int:
        """Copy the packet to the device in one go; return its bytes."""
        self.device.upload(self.packet, self.staged, 0, 4 * self._used)
        return 4 * self._used

    def _grow(self, batch: Batch) -> None:
        """Make room for the batch's lists; doubling, so that it happens a few times at most."""
        wanted = dict(self.lists)
        for kind, (_, first, *_rest) in LISTS.items():
            while wanted[kind] < len(getattr(batch, first)):
                wanted[kind] *= 2
        if wanted != self.lists:
            self.lists, self.moved = wanted, True
            self.device.synchronize()
            self._place()
