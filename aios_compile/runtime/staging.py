"""The inputs of a step on a device: a packet, sent in one copy, and where a kernel unfolds it.

The host writes what it alone knows (token ids, lengths, pages in use, sampling rows) as one run of
words (packet_writer.py), in one of two pinned buffers by turns: the other one may still be read by
a copy that was asked for. On the device there is one packet; copies and graphs run in the order
asked, so a copy into it waits for the step that reads it. The first kernel of a step makes the
inputs from it, padding included, at places that are fixed for the largest sizes, so that a captured
graph finds them there. The lists of the sampler (penalties, biases, allowed ids) grow; then all
blocks move, and graphs that were captured before are of no use (`moved` says so).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aios_compile.codegen.operand import BYTES, dim_value
from aios_compile.codegen.program import TensorEntry
from aios_compile.codegen.step_packet import LISTS, most_words
from aios_compile.runtime.batch import Batch, Ints, Limits
from aios_compile.runtime.device import Device
from aios_compile.runtime.packet_writer import PacketWriter

ALIGNMENT = 256  # bytes: what a GPU's copy engine and 16-byte loads like
FIRST_LIST = 1024  # entries that a list holds before it grows
SIZE_NAMES = {"penalty": "NP", "bias": "NB", "allowed": "NA"}  # as in an input's shape
SIDES = 2  # host buffers: a step may be begun while one runs


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
    `packet` is what the first kernel reads; `writers` has the host's sides of it."""

    def __init__(self, inputs: Sequence[TensorEntry], limits: Limits, device: Device) -> None:
        self.inputs, self.limits, self.device = inputs, limits, device
        self.lists = dict.fromkeys(LISTS, FIRST_LIST)
        self.moved = False
        self._place()

    def _place(self) -> None:
        """Lay the inputs out and allocate them, and the packet on both sides."""
        self.offsets, size = place_inputs(self.inputs, self.limits, self.lists)
        num_bytes = 4 * packet_words(self.limits, self.lists)
        sides = [self.device.host_bytes(num_bytes) for _ in range(SIDES)]
        self.writers = [PacketWriter(side, self.limits.page_size) for side in sides]
        self.packet = self.device.allocate(num_bytes)
        self.memory = self.device.allocate(size)

    def fill(self, batch: Batch, sources: Ints | None = None, side: int = 0) -> None:
        """Write the packet of a batch; nothing that was asked for reads this side any more."""
        self._grow(batch)
        self.writers[side].fill(batch, sources)

    def fill_empty(self, side: int = 0) -> None:
        """Write the packet of a batch of nothing: a step that changes only the trash page."""
        self.writers[side].fill_empty()

    def upload(self, side: int = 0) -> int:
        """Ask for the copy of the packet to the device, in one go; return its bytes."""
        used = self.writers[side].used
        self.device.upload(self.packet, 0, used)
        return len(used)

    def _grow(self, batch: Batch) -> None:
        """Make room for the batch's lists; doubling, so that it happens a few times at most."""
        wanted = dict(self.lists)
        for kind, (_, first, *_rest) in LISTS.items():
            while wanted[kind] < len(getattr(batch, first)):
                wanted[kind] *= 2
        if wanted != self.lists:
            self.lists, self.moved = wanted, True
            self.device.synchronize()  # steps that were begun read the old places
            self._place()
