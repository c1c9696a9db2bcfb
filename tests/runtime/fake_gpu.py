"""GpuExecutor with the fake model (fake_executor.py) for a program, on a device that lags behind.

The kernels are numpy; packets, graphs, marks, copies and pages are those of the executor. The first
kernel reads the packet by what codegen/step_packet.py says, not by the code that writes it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.operand import BYTES, SizeExpr
from aios_compile.codegen.program import (
    Function,
    Kernel,
    Launch,
    MemoryPlan,
    Program,
    Ref,
    StateEntry,
    TensorEntry,
)
from aios_compile.codegen.step_packet import LISTS, ROW_INPUTS, header_word
from aios_compile.codegen.step_results import StepResults
from aios_compile.runtime.batch import Batch, Limits
from aios_compile.runtime.gpu_executor import GpuExecutor, token_buckets
from tests.interpreted.lagging_device import LaggingDevice
from tests.runtime.fake_executor import FakeExecutor

ROWS = SizeExpr(((("R",), 1),))
OUTPUTS = {
    "sampled_ids": ("i64", 1), "ranks": ("i64", 1), "finite": ("i64", 1), "top_ids": ("i64", 20),
    "logprobs": ("f32", 1), "top_logprobs": ("f32", 20),
}  # fmt: skip
FLOATS = ("temperature", "top_p", "min_p", "bias_values")
FLOATS += ("repetition_penalty", "presence_penalty", "frequency_penalty")


def fake_program(limits: Limits) -> Program:
    """Return a step of two kernels: the model, and what collects its rows."""
    entries, end, rows = [], 0, limits.max_num_logit_rows
    for name, (dtype, width) in {**OUTPUTS, "logits": ("f32", limits.vocab_size)}.items():
        shape = (ROWS,) if width == 1 else (ROWS, width)
        entries.append(TensorEntry(name, dtype, shape, end))
        end += BYTES[dtype] * width * rows
    places = [Ref("arena", entry.offset) for entry in entries]
    states = tuple(StateEntry(name, "i64", (limits.page_size,)) for name in ("tokens", "positions"))
    model = (Ref("packet", 0), *places, Ref("state", 0), Ref("state", 1))
    launches = (
        Launch(0, model, 0, "model"),
        Launch(1, (*places[:-1], Ref("results", 0)), 1, "collect"),
    )
    sizes = {"T": limits.max_num_batched_tokens, "S": limits.max_num_seqs, "R": rows}
    return Program(
        tuple(Kernel(name, name, "", ()) for name in ("model", "collect")),
        (Function("step", launches),), (), (), tuple(entries), states,
        MemoryPlan(end, end, end, ()), sizes, 2, {},
    )  # fmt: skip


def unfold(words: NDArray[np.int32], sampled: NDArray[np.int64], limits: Limits) -> Batch:
    """Return the batch that a packet holds, without padding."""
    tokens, sequences, rows = (int(x) for x in words[:3])

    def section(name: str, count: int) -> NDArray[Any]:
        begin = int(words[header_word(name)])
        if name == "seeds":
            return words[begin : begin + 2 * count].copy().view(np.int64)
        found = words[begin : begin + count].copy()
        return found.view(np.float32) if name in FLOATS else found.astype(np.int64)

    ids, starts = section("token_ids", tokens), section("query_starts", sequences + 1)
    unknown = ids < 0
    ids[unknown] = sampled[-1 - ids[unknown]]
    contexts, first = section("context_lengths", sequences), section("first_lengths", sequences)
    table_starts = section("table_starts", sequences + 1)
    pages = section("pages", int(table_starts[-1]))
    tables = np.zeros((sequences, limits.max_pages_per_sequence), np.int64)
    positions, lengths = np.zeros((2, tokens), np.int64)
    slots = np.zeros(tokens, np.int64)
    for s in range(sequences):
        own = pages[table_starts[s] : table_starts[s + 1]]
        tables[s, : len(own)] = own
        here = slice(starts[s], starts[s + 1])
        where = np.arange(contexts[s] - (starts[s + 1] - starts[s]), contexts[s])
        positions[here], lengths[here] = where, np.maximum(first[s], where + 1)
        slots[here] = own[where // limits.page_size] * limits.page_size + where % limits.page_size
    found = {name: section(name, rows) for name in ROW_INPUTS}
    for begins, *columns in LISTS.values():
        found[begins] = section(begins, rows + 1)
        found |= {name: section(name, int(found[begins][-1])) for name in columns}
    return Batch(ids, positions, lengths, slots, starts, contexts, tables, **found)


class NumpyKernel:
    """A module with one kernel, a function of arrays."""

    RESIDENT: dict[int, int] = {}

    def __init__(self, types: list[str], run: Any, device: LaggingDevice) -> None:
        self.TYPES, self.run, self.device = types, run, device

    def __getitem__(self, grid: Any) -> Any:
        return lambda *operands, **sizes: self.run([x.numpy() for x in operands], **sizes)

    def launch(self, operands: Any, **sizes: int) -> None:
        self.device.launch(self, (1,), tuple(operands), sizes)


def _of_model(name: str) -> Any:
    return property(lambda s: getattr(s.model, name), lambda s, x: setattr(s.model, name, x))


class FakeGpu(GpuExecutor):
    """See the module. What tests look at in a FakeExecutor is there too."""

    free_pages, before_step = _of_model("free_pages"), _of_model("before_step")
    num_steps, step_seconds = _of_model("num_steps"), _of_model("step_seconds")
    after_logits, on_read = _of_model("after_logits"), _of_model("on_read")

    def __init__(self, limits: Limits, window: int | None = None, seed: int = 0) -> None:
        buckets = limits.token_buckets or token_buckets(limits.max_num_batched_tokens)
        self.model = FakeExecutor(dataclasses.replace(limits, token_buckets=()), window)
        program, device = fake_program(limits), LaggingDevice(seed)
        self.spec = StepResults.of(program.outputs, program.sizes)
        pointers = {"i64": "*i64", "f32": "*fp32"}
        places = [pointers[entry.dtype] for entry in program.outputs]
        modules = [
            NumpyKernel(["*i32", *places, "*i64", "*i64"], self._run_model, device),
            NumpyKernel([*places[:-1], "*u8"], self._collect, device),
        ]
        planned = dataclasses.replace(limits, token_buckets=buckets, unfolds=True)
        super().__init__(program, modules, {}, planned, device, num_host_pages=40)
        pools = [device.typed(self._states, begin, "*i64").numpy() for begin in self._state_offsets]
        size = limits.num_pages * limits.page_size
        self.model.tokens, self.model.positions = (pool[:size] for pool in pools)
        self.random = device.random
        self.capture()

    def _run_model(self, operands: list[NDArray[Any]], **sizes: int) -> None:
        words, *outputs = operands[:-2]
        if not words[0]:
            return  # a step of padding
        batch = unfold(words, outputs[0], self.limits)
        result = self.model._step(batch)
        assert batch.num_rows <= sizes["R"] and batch.num_tokens <= sizes["T"]
        for entry, place in zip(self.program.outputs, outputs):
            values = getattr(result, entry.name).reshape(-1)
            place[: len(values)] = values

    def _collect(self, operands: list[NDArray[Any]], R: int, **sizes: int) -> None:
        block, begins = operands[-1], self.spec.places(R)
        names = [entry.name for entry in self.program.outputs]
        for name, dtype, width in self.spec.outputs:
            values = operands[names.index(name)][: R * width]
            raw = values.view(np.uint8)
            block[begins[name] : begins[name] + len(raw)] = raw
            assert len(raw) == BYTES[dtype] * width * R
