"""A step's packet, unfolded by prepare_step, against the arrays of the batch and its padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from aios_compile.codegen.operand import dim_value
from aios_compile.codegen.program import TensorEntry
from aios_compile.codegen.step_packet import LISTS, ROW_INPUTS, known_inputs
from aios_compile.codegen.step_results import StepResults
from aios_compile.codegen.triton import prepare_step
from aios_compile.errors import CodegenError
from aios_compile.runtime.batch import Batch
from aios_compile.runtime.gpu_executor import GpuExecutor
from aios_compile.runtime.program_runner import NUMPY_DTYPES
from tests.interpreted.harness import PAGE, batch, model


@pytest.fixture(scope="module")
def executor() -> GpuExecutor:
    return model("qwen3_gqa", tokens=24).executor(captures=False)


def with_sampling(given: Batch, seed: int) -> Batch:
    """Return the batch with random sampling rows and lists."""
    draw = np.random.default_rng(seed)
    rows, changed = given.num_rows, {}
    for name in ROW_INPUTS:
        old = getattr(given, name)
        if name == "seeds":
            changed[name] = draw.integers(-(2**63), 2**63 - 1, rows)
        elif name != "logit_rows":
            whole = draw.integers(0, 99, rows)
            changed[name] = whole if old.dtype == np.int64 else draw.random(rows, np.float32)
    for starts, *columns in LISTS.values():
        lengths = draw.integers(0, 400, rows)
        changed[starts] = np.concatenate([[0], np.cumsum(lengths)])
        for name in columns:
            values = draw.integers(0, 120, lengths.sum())
            changed[name] = values.astype(getattr(given, name).dtype)
    return dataclasses.replace(given, **changed)


def expected(name: str, given: Batch, executor: GpuExecutor, sizes: dict[str, int]) -> Any:
    """Return what an input of the bucket must be: the batch, then padding."""
    entry = next(e for e in executor.program.inputs if e.name == name)
    values = getattr(given, name)
    lists = [column for _, *columns in LISTS.values() for column in columns]
    if name in lists:
        return values
    length = dim_value(entry.shape[0], sizes)
    full = np.zeros([length, *values.shape[1:]], values.dtype)
    full[: len(values)] = values
    rest = length - len(values)
    if name == "slots":
        full[len(values) :] = np.arange(rest) % PAGE
    elif name in ("top_p", "repetition_penalty", "sequence_lengths"):
        full[len(values) :] = 1
    elif name.endswith("_starts"):
        full[len(values) :] = values[-1]
    return full


@pytest.mark.parametrize(
    ("sequences", "bucket"),
    [([(0, 1)], 1), ([(5, 3), (40, 1), (0, 6)], 16), ([(17, 1)] * 4, 4), ([(0, 20), (63, 1)], 24)],
)
def test_inputs_are_those_of_the_batch_and_padding(
    executor: GpuExecutor, sequences: list[tuple[int, int]], bucket: int
) -> None:
    """Some token ids are what rows of the step before have sampled."""
    given = with_sampling(batch(sequences), seed=bucket)
    sizes = executor.sizes_of(bucket)
    executor.staging.memory.fill_(0x5A)
    executor.staging.packet.fill_(0x5A)
    place = next(e.offset for e in executor.program.outputs if e.name == "sampled_ids")
    sampled = executor.device.typed(executor._arena, place, "*i64")[: sizes["R"]]
    sampled.copy_(torch.arange(sizes["R"]) + 99_000)
    sources = np.where(np.arange(given.num_tokens) % 3 < 2, np.arange(given.num_tokens), -1)
    sources[sizes["R"] :] = -1
    executor.staging.fill(given, sources, side=1)
    executor.staging.upload(side=1)
    given.token_ids = np.where(sources < 0, given.token_ids, 99_000 + sources)
    every, executor.calls = executor.calls, executor.calls[:1]
    executor.launch_all(sizes)
    executor.calls = every
    flat = executor.staging.memory.numpy()
    for entry in executor.program.inputs:
        want = expected(entry.name, given, executor, sizes)
        begin = executor.staging.offsets[entry.name]
        got = flat[begin : begin + want.nbytes].view(NUMPY_DTYPES[entry.dtype])
        got = got.reshape(want.shape)
        if entry.name == "page_tables":  # beyond its pages a row is nobody's
            used = -(-given.context_lengths // PAGE)
            assert all((got[s, :n] == want[s, :n]).all() for s, n in enumerate(used))
        else:
            np.testing.assert_array_equal(got, want, err_msg=entry.name)


def test_a_packet_is_as_long_as_its_batch(executor: GpuExecutor) -> None:
    """A decode of one sequence sends a few hundred bytes, not the page tables of all."""
    staging = executor.staging
    staging.fill(batch([(40, 1)]))
    assert staging.upload() == 4 * (64 + 1 + 2 + 1 + 1 + 2 + 3 + 14 + 3 * 2)
    staging.fill(batch([(63, 1)] * 4))
    assert staging.upload() < len(staging.writers[0].host)


def test_an_input_that_no_packet_holds_is_refused() -> None:
    with pytest.raises(CodegenError, match="no step packet holds the input pixels"):
        prepare_step.spec_of([TensorEntry("pixels", "f32", (3,))], 16, 4)
    assert len(set(known_inputs())) == len(list(known_inputs()))


def test_results_lie_one_behind_the_other_the_wide_ones_first() -> None:
    entries = [
        TensorEntry("logits", "f32", (4, 99)),
        TensorEntry("logprobs", "f32", (4,)),
        TensorEntry("ids", "i64", (4,)),
        TensorEntry("top_ids", "i64", (4, 20)),
    ]
    found = StepResults.of(entries, {})
    assert found.outputs == (("ids", "i64", 1), ("top_ids", "i64", 20), ("logprobs", "f32", 1))
    assert found.row_bytes() == 8 + 160 + 4
    assert found.places(3) == {"ids": 0, "top_ids": 24, "logprobs": 24 + 480}
