"""The inputs of a step on a device: one block of memory, filled on the host, copied in one go.

Every input has a fixed place for its largest size, so that a captured graph finds it there in every
step. What a bucket of tokens holds beyond the batch is filled anew in each step: a padded token
writes to the trash page, a padded sequence has no tokens, a padded row is greedy and has no lists.
The lists of the sampler (penalties, biases, allowed ids) grow; then the block moves, and graphs
that were captured before are of no use (`moved` says so).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.operand import BYTES, SizeExpr, dim_value
from aios_compile.codegen.program import TensorEntry
from aios_compile.runtime.batch import TRASH_PAGE, Batch, Limits
from aios_compile.runtime.device import Device
from aios_compile.runtime.program_runner import NUMPY_DTYPES

ALIGNMENT = 256  # bytes: what a GPU's copy engine and 16-byte loads like
LISTS = ("NP", "NB", "NA")  # sizes that a request chooses
FIRST_LIST = 1024  # entries that a list holds before it grows
ONES = ("top_p", "repetition_penalty", "sequence_lengths")  # neutral is 1; of all others 0
RUNNING = ("query_starts", "penalty_starts", "bias_starts", "allowed_starts")  # repeat the last


@dataclass(frozen=True)
class Slot:
    """The place of one input: byte offset, bytes, and its view of the host block."""

    entry: TensorEntry
    offset: int
    num_bytes: int
    view: NDArray[Any]
    is_list: bool


class Staging:
    """The inputs of a program on a device. `memory` is where kernels read them."""

    def __init__(self, inputs: Sequence[TensorEntry], limits: Limits, device: Device) -> None:
        self.inputs, self.limits, self.device = inputs, limits, device
        self.lists = dict.fromkeys(LISTS, FIRST_LIST)
        self.moved = False
        self._in_use: dict[str, int] = {}
        self._place()

    def _place(self) -> None:
        """Lay the inputs out, lists last, and allocate both blocks."""
        limits = self.limits
        sizes = {
            "T": limits.padded_tokens(limits.max_num_batched_tokens),
            "S": limits.max_num_seqs,
            "R": limits.max_num_logit_rows,
            **self.lists,
        }
        ordered = sorted(self.inputs, key=_is_list)
        shapes = {e.name: [dim_value(d, sizes) for d in e.shape] for e in ordered}
        offsets, end = {}, 0
        for entry in ordered:
            offsets[entry.name] = end
            size = int(np.prod(shapes[entry.name])) * BYTES[entry.dtype]
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.staged = self.device.host_bytes(end)
        self.memory = self.device.allocate(end)
        self.fixed_bytes = min((offsets[e.name] for e in ordered if _is_list(e)), default=end)
        self.slots: dict[str, Slot] = {}
        for entry in ordered:
            begin = offsets[entry.name]
            size = int(np.prod(shapes[entry.name])) * BYTES[entry.dtype]
            raw: NDArray[Any] = self.staged[begin : begin + size].view(NUMPY_DTYPES[entry.dtype])
            view = raw.reshape(shapes[entry.name])
            self.slots[entry.name] = Slot(entry, begin, size, view, _is_list(entry))

    def fill(self, batch: Batch, sizes: Mapping[str, int]) -> None:
        """Write a batch and the padding of its bucket to the host block."""
        self._grow(batch)
        for name, slot in self.slots.items():
            array = getattr(batch, name)
            slot.view[: len(array)] = array
            if slot.is_list:
                self._in_use[name] = len(array)
            else:
                self._pad(name, slot, len(array), dim_value(slot.entry.shape[0], sizes))

    def fill_empty(self, sizes: Mapping[str, int]) -> None:
        """Write padding only: a step that changes nothing but the trash page."""
        self._in_use.clear()
        for name, slot in self.slots.items():
            if not slot.is_list:
                self._pad(name, slot, 0, dim_value(slot.entry.shape[0], sizes))

    def _pad(self, name: str, slot: Slot, begin: int, end: int) -> None:
        if name == "slots":
            size = self.limits.page_size
            slot.view[begin:end] = TRASH_PAGE * size + np.arange(end - begin) % size
        elif name in RUNNING:
            slot.view[begin:end] = slot.view[begin - 1] if begin else 0
        else:
            slot.view[begin:end] = 1 if name in ONES else 0

    def upload(self) -> None:
        """Copy what was filled to the device: one copy, and one for each list in use."""
        self.device.upload(self.memory, self.staged, 0, self.fixed_bytes)
        for name, used in self._in_use.items():
            if used:
                slot = self.slots[name]
                end = slot.offset + used * BYTES[slot.entry.dtype]
                self.device.upload(self.memory, self.staged, slot.offset, end)

    def _grow(self, batch: Batch) -> None:
        """Make room for the batch's lists; doubling, so that it happens a few times at most."""
        wanted = dict(self.lists)
        for entry in self.inputs:
            if _is_list(entry):
                kind = _list_size(entry)
                while wanted[kind] < len(getattr(batch, entry.name)):
                    wanted[kind] *= 2
        if wanted != self.lists:
            self.lists, self.moved = wanted, True
            self.device.synchronize()
            self._place()


def _list_size(entry: TensorEntry) -> str:
    dim = entry.shape[0] if entry.shape else 0
    factors = [f for term in dim.terms for f in term[0]] if isinstance(dim, SizeExpr) else []
    return next((f for f in factors if f in LISTS), "")


def _is_list(entry: TensorEntry) -> bool:
    return bool(_list_size(entry))
