"""The Triton sampler in the interpreter: the tokens of the reference and of the C++ sampler."""

from __future__ import annotations

import functools

import pytest
import torch

from aios_compile.ir import (
    ops,  # noqa: F401  (registers the ops)
    sample_reference,
)
from tests.codegen import test_sample
from tests.codegen.test_sample import body_of, inputs_for, lists_with_ids_outside
from tests.codegen.triton_modules import load, poisoned
from tests.codegen.triton_modules import run as launch
from tests.variants import nightly

pytest.importorskip("triton")

import dataclasses

from aios_compile.codegen.cpp.sample import OUTPUTS
from aios_compile.codegen.triton import sample
from aios_compile.codegen.triton.choice import Tuning


@functools.cache
def kernel(vocabulary, chunk):
    spec = sample.spec_of(*body_of(vocabulary))
    assert spec is not None
    source = sample.emit(dataclasses.replace(spec, chunk=chunk))
    return source, load(source)


def run(built, logits, inputs):
    rows = logits.shape[0]
    kinds = [(), (), (), (20,), (20,), ()]
    dtypes = [torch.int64, torch.float32, torch.int64, torch.int64, torch.float32, torch.int64]
    out = [poisoned((rows, *k), d) for k, d in zip(kinds, dtypes)]
    source, module = built
    launch(source, module, [logits, *inputs, *out], R=rows)
    return out


def check(vocabulary, chunk, logits, inputs):
    """Hold the outputs to the reference, and the ids and ranks to the C++ sampler."""
    actual, expected = (
        run(kernel(vocabulary, chunk), logits, inputs),
        sample_reference.sample(logits, *inputs),
    )
    for a, e, name in zip(actual, expected, OUTPUTS):
        if a.dtype == torch.int64:
            assert torch.equal(a, e), name
        else:
            torch.testing.assert_close(a, e, atol=3e-6, rtol=1e-5, msg=name)
    native = test_sample.run(test_sample.kernel(vocabulary), logits, inputs)
    for a, n, name in zip(actual, native, OUTPUTS):
        assert a.dtype != torch.int64 or torch.equal(a, n), name
    return actual


@pytest.mark.parametrize(("vocabulary", "chunk"), [(1, 16), (37, 16), (200, 128)])
def test_greedy_ties_ranks_and_logprobs(vocabulary, chunk):
    logits = torch.randint(-3, 4, (5, vocabulary)).float()  # full of ties
    inputs = inputs_for(5, logprob_counts=torch.arange(5) * 5)
    ids, *_ = check(vocabulary, chunk, logits, inputs)
    first = [int((row == row.max()).int().argmax()) for row in logits]
    assert torch.equal(ids, torch.tensor(first))


def test_no_token_differs_from_either_oracle():
    g = torch.Generator().manual_seed(5)
    vocabulary = 333
    options = {
        "temperature": torch.tensor([1.0, 0.7, 2.0, 0.1, 1, 1, 1.3, 1.0, 5.0, 0.9, 1, 1, 1]),
        "top_k": torch.tensor([0, 0, 5, 40, 1, 0, 0, 20, 0, 332, 400, 0, 7]),
        "top_p": torch.tensor([1.0, 0.9, 1, 0.5, 1, 0.99, 0.0, 0.8, 1, 0.95, 0.3, 1, 1e-9]),
        "min_p": torch.tensor([0.0, 0, 0, 0, 0, 0.05, 0, 0.01, 0.2, 0, 0, 1.0, 0]),
    }
    for i in range(2):
        logits = torch.randn(13, vocabulary, generator=g) * [3.0, 1.0][i]
        inputs = inputs_for(
            13, seeds=torch.randint(-(2**63), 2**63 - 1, (13,), generator=g),
            sample_positions=torch.arange(13) + i * 13, **options,
        )  # fmt: skip
        check(vocabulary, 256, logits.round() if i % 2 else logits, inputs)


def test_many_draws_without_filters():
    g, rows = torch.Generator().manual_seed(6), 25
    logits = torch.randn(rows, 97, generator=g)
    inputs = inputs_for(rows, temperature=0.8, seeds=77, sample_positions=torch.arange(rows))
    inputs[9] = inputs[12] = inputs[15] = torch.zeros(rows + 1, dtype=torch.int64)
    assert len(set(check(97, 128, logits, inputs)[0].tolist())) > 12


def test_lists_penalties_and_ids_outside_the_vocabulary():
    vocabulary = 50
    logits, inputs = lists_with_ids_outside(vocabulary)
    ids, *_ = check(vocabulary, 16, logits, inputs)
    assert ids[2:6].tolist() == [0, 49, 49, 49]


def test_everything_banned_gives_id_0():
    inputs = inputs_for(2, temperature=torch.tensor([0.0, 1.0]), allowed=[[99], [-1]])
    assert check(37, 16, torch.randn(2, 37), inputs)[0].tolist() == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), *nightly(float("-inf"), float("inf"))])
def test_a_bad_row_fails_alone(value):
    logits = torch.randn(4, 37)
    inputs = inputs_for(
        4, temperature=torch.tensor([0.0, 1.0, 0.0, 1.0]), logprob_counts=3, top_p=0.9
    )
    fine = run(kernel(37, 16), logits, inputs)
    logits[1, 36] = value
    now = check(37, 16, logits, inputs)
    assert now[5].tolist() == [1, 0, 1, 1]
    for after, before in zip(now[:5], fine):
        assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def test_the_clock_may_choose_warps_that_no_sum_sees() -> None:
    """Largest values and counts are the same in any order; what adds floats keeps its warps."""
    spec = sample.spec_of(*body_of(1000))
    assert spec is not None
    source = sample.emit(spec, tuning=Tuning(timed=9))
    (variant,) = load(source).VARIANTS
    assert len(variant["candidates"]) == len(source.candidates) == len(sample.FORMS) - 1
    for launches in variant["candidates"].values():
        changed = []
        for plain, other in zip(variant["launches"], launches):
            assert plain["grid"](1, 1, 3, 1) == other["grid"](1, 1, 3, 1)
            assert plain["kernel"] is other["kernel"]
            if plain["options"] != other["options"]:
                changed.append(plain["kernel"].__name__.rpartition("_")[2])
        assert changed and set(changed) <= {"draw", "rank"}
    assert sample.emit(spec).text == sample.emit(spec, tuning=Tuning()).text
