"""Whole tiny models as Triton kernels in the interpreter: prefill, chunks, decode and mixtures.

Each step is held to eager on the same last level and to the C++ target; quantised ones too. More
formats, families and types are in tests/nightly (test_interpreted_*.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import aios_compile
from aios_compile.ir import quantized
from aios_compile.runtime.batch import Batch, Executor, StepResult
from tests import zoo
from tests.interpreted.harness import Model, assert_close, batch, exact_activations, model
from tests.interpreted.lagging_device import LaggingDevice
from tests.quick_builds import build_quickly
from tests.variants import nightly

NAME = "qwen3_gqa"
STEPS = (
    [(0, 5), (0, 2)],  # two prompts, padded to the bucket of eight
    [(5, 1), (2, 4), (0, 3)],  # a decode, a later chunk, a new prompt
    [(6, 1), (6, 1), (3, 1)],  # decodes, padded to the bucket of four
)
Native = Callable[..., Executor]


@pytest.fixture
def native(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Native]:
    """Return a function that gives the C++ target's executor of the model, closed after the test.

    Sizes and options are those of tests/compiled, so that a run builds a kernel once.
    """
    build_quickly(monkeypatch)
    monkeypatch.setenv("AIOS_VERIFY", "0")
    opened: list[aios_compile.CompiledModel] = []
    sizes = {"max_num_batched_tokens": 21, "max_num_seqs": 8}

    def open_one(**options: Any) -> Executor:
        path = zoo.make(NAME, tmp_path_factory.getbasetemp(), "float32")
        given = {**sizes, "num_threads": 1, "progress": False, **options}
        opened.append(aios_compile.load_and_compile(path, **given))
        return opened[-1].engine.executor

    yield open_one
    for found in opened:
        found.close()


def on_cpu(executor: Executor, given: Batch) -> StepResult:
    """Run a batch; the C++ program's page tables may be wider."""
    width = executor.limits.max_pages_per_sequence - given.page_tables.shape[1]
    tables = np.pad(given.page_tables, [(0, 0), (0, width)])
    return executor.step(replace(given, page_tables=tables))


def check(built: Model, tolerance: float, native: Executor | None = None) -> None:
    """Run the steps on both; the first sequence then goes on from a copy of its page."""
    ours, eager = built.executor(), built.eager()
    for number, sequences in enumerate(STEPS):
        given = batch(sequences, seed=number)
        got = ours.step(given)
        assert_close(got, eager.step(given), tolerance)
        if native is not None:
            assert_close(got, on_cpu(native, given), tolerance)
    assert set(ours.graphs) == {8, 4}
    for executor in (ours, eager):
        executor.copy_pages([(1, 20)])
    assert_close(*(e.step(batch([(7, 1)], first_page=20)) for e in (ours, eager)), tolerance)


def test_steps_are_those_of_eager_and_of_the_cpu(native: Native) -> None:
    check(model(NAME), 1e-5, native())


def test_steps_begun_ahead_are_those_of_eager() -> None:
    """The ids of each decode come from the step before, which has not run when it is asked for."""
    built = model(NAME)
    ours, eager = built.executor(LaggingDevice(eagerness=0.0)), built.eager()
    rows = np.arange(2)
    steps = [
        batch(sequences) for sequences in ([(0, 5), (0, 2)], [(5, 1), (2, 1)], [(6, 1), (3, 1)])
    ]
    first = ours.begin(steps[0])
    for number, given in enumerate(steps):
        second = ours.begin(steps[number + 1], rows) if number < 2 else None
        got, theirs = first.wait(), eager.step(given)
        assert list(got.sampled_ids) == list(theirs.sampled_ids)
        np.testing.assert_allclose(got.logprobs, theirs.logprobs, atol=1e-5)
        if second is not None:
            first, steps[number + 1].token_ids = second, np.array(theirs.sampled_ids)


@pytest.mark.parametrize("form", ["int8", *nightly("int4")])
def test_quantised_steps_are_those_of_eager(
    form: str, native: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU rounds activations to 8 bits, and so does eager: without that it is held to Triton,
    and with it to the CPU. The two targets' tokens may differ where two are as likely.
    """
    built = model(NAME, quantization=form)
    packed = {entry.packed for entry in built.program.weights}
    assert any(name.startswith(f"planar.{form}") for name in packed), packed
    ours, exact, rounded = built.executor(), built.eager(), built.eager()
    cpu = native(quantization=form) if form == "int8" else None
    for number, sequences in enumerate(STEPS[:2]):
        given = batch(sequences, seed=number)
        got = ours.step(given)
        with monkeypatch.context() as patch:
            patch.setattr(quantized, "quantize_activations", exact_activations)
            assert_close(got, exact.step(given), 2e-4)
        if cpu is None:
            continue
        theirs = on_cpu(cpu, given)
        assert_close(theirs, rounded.step(given), 2e-2)  # a tie that falls otherwise
        far, logits = np.abs(got.logits - theirs.logits), np.sort(got.logits, axis=-1)
        assert far.max() < 0.15
        sure = logits[:, -1] - logits[:, -2] > 0.3
        assert sure.any() and all(got.sampled_ids[sure] == theirs.sampled_ids[sure])
