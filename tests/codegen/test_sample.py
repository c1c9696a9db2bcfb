"""The sampling kernel against its reference: options, ties, bad ids, NaN, the distribution."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from aios_compile.codegen.cpp import build, sample
from aios_compile.ir import (
    ops,  # noqa: F401  (registers the ops)
    sample_reference,
)
from aios_compile.ir.sample_op import INPUTS
from tests.codegen.harness import Kernel, make_body
from tests.variants import nightly


def body_of(vocabulary):
    def function(
        logits, temperature, top_k, top_p, min_p, seeds, positions, repetition, presence, frequency,
        penalty_starts, penalty_ids, penalty_counts, bias_starts, bias_ids, bias_values,
        allowed_starts, allowed_ids, logprob_counts, given_ids, has_given,
    ):  # fmt: skip
        out = torch.ops.aios.sample.default(
            logits, temperature, top_k, top_p, min_p, seeds, positions, repetition, presence,
            frequency, penalty_starts, penalty_ids, penalty_counts, bias_starts, bias_ids,
            bias_values, allowed_starts, allowed_ids, logprob_counts, given_ids, has_given,
        )  # fmt: skip
        return tuple(out[i] for i in range(6))

    inputs = {"logits": (("R", vocabulary), torch.float32)}
    for name, (dtype, size) in INPUTS.items():
        inputs[name] = ((14 if size == "R+1" else size,), dtype)
    return make_body(function, inputs)


@functools.cache
def kernel(vocabulary, target=None):
    spec = sample.spec_of(*body_of(vocabulary))
    assert spec is not None
    return Kernel(sample.emit(spec), target and build.Target.named(target))


def inputs_for(rows, **given):
    """Return the op's inputs as tensors; lists are given as one list a row."""
    empty = [[] for _ in range(rows)]
    lists = {name: given.pop(name, empty) for name in ("penalty", "bias", "allowed")}
    starts = {k: [0, *np.cumsum([len(x) for x in v])] for k, v in lists.items()}
    flat = {k: [entry for row in v for entry in row] for k, v in lists.items()}
    values = {
        "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 0,
        "sample_positions": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "logprob_counts": 0, "given_ids": 0, "has_given": 0,
        "penalty_starts": starts["penalty"], "bias_starts": starts["bias"],
        "allowed_starts": starts["allowed"], "penalty_ids": [e[0] for e in flat["penalty"]],
        "penalty_counts": [e[1] for e in flat["penalty"]], "bias_ids": [e[0] for e in flat["bias"]],
        "bias_values": [e[1] for e in flat["bias"]], "allowed_ids": flat["allowed"],
    } | given  # fmt: skip
    tensors = []
    for name, (dtype, size) in INPUTS.items():
        value = torch.as_tensor(values[name], dtype=dtype)
        tensors.append(value.expand(rows).contiguous() if size == "R" else value)
    return tensors


def run(built, logits, inputs, splits=1):
    rows = logits.shape[0]
    out = [
        torch.full((rows,), -7), torch.full((rows,), float("nan")), torch.full((rows,), -7),
        torch.full((rows, 20), -7), torch.full((rows, 20), float("nan")), torch.full((rows,), -7),
    ]  # fmt: skip
    built({"R": rows}, logits, *inputs, *out, splits=splits)
    return out


def check(built, logits, inputs):
    actual, expected = run(built, logits, inputs), sample_reference.sample(logits, *inputs)
    for a, e, name in zip(actual, expected, sample.OUTPUTS):
        if a.dtype == torch.int64:
            assert torch.equal(a, e), name
        else:
            torch.testing.assert_close(a, e, atol=3e-6, rtol=1e-5, msg=name)
    for a, b in zip(actual, run(built, logits, inputs, splits=3)):
        assert torch.equal(a, b)
    return actual


def test_philox_known_answers():
    """The vectors of the Random123 distribution."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    words = sample_reference.philox((zero,) * 4, (0, 0))
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = sample_reference.philox((ones,) * 4, (0xFFFFFFFF, 0xFFFFFFFF))
    assert [int(w) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("vocabulary", [1, 5, 37, 1000])
def test_greedy_ties_ranks_and_logprobs(vocabulary):
    logits = torch.randint(-3, 4, (13, vocabulary)).float()  # full of ties
    inputs = inputs_for(13, logprob_counts=torch.arange(13) * 2, sample_positions=torch.arange(13))
    ids, *_ = check(kernel(vocabulary), logits, inputs)
    first = [int((row == row.max()).int().argmax()) for row in logits]
    assert torch.equal(ids, torch.tensor(first))


@pytest.mark.parametrize("target", ["avx512", *nightly("avx2", "portable")])
def test_no_token_differs_in_ten_thousand_draws(target):
    if build.Target.named(target).vector_bytes > build.Target.host().vector_bytes:
        pytest.skip("the processor lacks the instructions")
    g = torch.Generator().manual_seed(5)
    vocabulary, rounds = 333, 100 if target == "avx512" else 15
    options = {
        "temperature": torch.tensor([1.0, 0.7, 2.0, 0.1, 1, 1, 1.3, 1.0, 5.0, 0.9, 1, 1, 1]),
        "top_k": torch.tensor([0, 0, 5, 40, 1, 0, 0, 20, 0, 332, 400, 0, 7]),
        "top_p": torch.tensor([1.0, 0.9, 1, 0.5, 1, 0.99, 0.0, 0.8, 1, 0.95, 0.3, 1, 1e-9]),
        "min_p": torch.tensor([0.0, 0, 0, 0, 0, 0.05, 0, 0.01, 0.2, 0, 0, 1.0, 0]),
    }
    draws, differ = 0, 0
    for i in range(rounds):
        scale = [1.0, 4.0, 0.0][i % 3]
        logits = torch.randn(13 * 3, vocabulary, generator=g) * scale
        logits = logits[:13] if i % 2 else logits[13:26].round()
        inputs = inputs_for(
            13, seeds=torch.randint(-(2**63), 2**63 - 1, (13,), generator=g),
            sample_positions=torch.arange(13) + i * 13, **options,
        )  # fmt: skip
        ids = run(kernel(vocabulary, target), logits, inputs)[0]
        differ += int((ids != sample_reference.sample(logits, *inputs)[0]).sum())
        draws += 13
    assert differ == 0, f"{differ} of {draws} tokens differ"
    if target == "avx512":  # the rest of ten thousand without filters, many rows at once
        for i in range(25):
            logits = torch.randn(350, vocabulary, generator=g)
            inputs = inputs_for(350, temperature=1.0, seeds=i, sample_positions=torch.arange(350))
            inputs[9] = inputs[12] = inputs[15] = torch.zeros(351, dtype=torch.int64)
            ids = run(kernel(vocabulary, target), logits, inputs)[0]
            assert torch.equal(ids, sample_reference.sample(logits, *inputs)[0])
            draws += 350
        assert draws >= 10_000


def test_filters_of_a_large_vocabulary():
    """From 4096 entries on, top_k first bounds what can be kept by the maxima of groups."""
    vocabulary, g = 5003, torch.Generator().manual_seed(8)
    for scale, bias in ((3.0, []), (0.0, []), (3.0, [(t, float("-inf")) for t in range(5000)])):
        logits = torch.randn(13, vocabulary, generator=g) * scale
        inputs = inputs_for(
            13, temperature=torch.linspace(0.2, 3.0, 13), seeds=torch.arange(13),
            top_k=torch.tensor([1, 2, 50, 1000, 1024, 1025, 5002, 0, 40, 40, 3, 0, 7]),
            top_p=torch.tensor([1, 1, 1, 1, 1, 1, 1, 0.9, 0.9, 0.1, 0.7, 0.999, 0.5]),
            bias=[bias] * 13,
        )  # fmt: skip
        check(kernel(vocabulary), logits, inputs)


def lists_with_ids_outside(vocabulary):
    """Return logits [13, V], and inputs whose lists also name ids that do not exist."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(13, vocabulary, generator=g) * 3
    bad = [-1, 50, 2**40, -(2**62)]
    row = lambda n: torch.randperm(vocabulary, generator=g)[:n].tolist()  # noqa: E731
    inputs = inputs_for(
        13,
        temperature=torch.tensor([0.0, 1.0] * 6 + [0.0]),
        seeds=torch.arange(13), sample_positions=torch.arange(13) * 3,
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, logprob_counts=20,
        penalty=[[(t, i % 3) for i, t in enumerate(row(10) + bad)] for _ in range(13)],
        bias=[[(t, 1.5 if t % 2 else float("-inf")) for t in row(6) + bad] for _ in range(13)],
        allowed=[[] if r % 3 else row(20) + bad for r in range(13)],
        given_ids=torch.tensor([0, 3, -5, 49, 50, 2**40, 1, 2, 3, 4, 5, 6, 7]),
        has_given=torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]),
    )  # fmt: skip
    return logits, inputs


def test_lists_penalties_and_ids_outside_the_vocabulary():
    vocabulary = 50
    logits, inputs = lists_with_ids_outside(vocabulary)
    ids, *_ = check(kernel(vocabulary), logits, inputs)
    assert ((ids >= 0) & (ids < vocabulary)).all()
    assert ids[2:6].tolist() == [0, 49, 49, 49]


def test_everything_banned_gives_id_0():
    inputs = inputs_for(2, temperature=torch.tensor([0.0, 1.0]), allowed=[[99], [-1]])
    assert check(kernel(37), torch.randn(2, 37), inputs)[0].tolist() == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_fails_alone(value):
    logits = torch.randn(4, 37)
    inputs = inputs_for(4, temperature=torch.tensor([0.0, 1.0, 0.0, 1.0]), logprob_counts=3)
    fine = run(kernel(37), logits, inputs)
    logits[1, 36] = value
    ids, logprobs, ranks, top_ids, top_logprobs, finite = check(kernel(37), logits, inputs)
    assert finite.tolist() == [1, 0, 1, 1] and ids[1] == 0 and ranks[1] == 0
    for now, before in zip((ids, logprobs, ranks, top_ids, top_logprobs), fine):
        assert torch.equal(now[[0, 2, 3]], before[[0, 2, 3]])


def test_the_sampled_distribution_is_the_softmax():
    """Chi-square over 20,000 draws; 40 tokens, the 99.99 % quantile of 39 degrees is 83."""
    vocabulary, draws = 40, 20_000
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1)) * 1.5
    inputs = inputs_for(draws, temperature=0.8, seeds=1234, sample_positions=torch.arange(draws))
    inputs[9] = inputs[12] = inputs[15] = torch.zeros(draws + 1, dtype=torch.int64)
    ids = run(kernel(vocabulary), logits.expand(draws, -1).contiguous(), inputs)[0]
    expected = torch.softmax(logits[0].double() / 0.8, -1) * draws
    counts = torch.bincount(ids, minlength=vocabulary)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 83, chi_square


def test_top_p_is_the_smallest_prefix_of_the_sorted_order():
    """Tokens that come out under one filter, by many draws: exactly the defined prefix."""
    vocabulary = 16
    probabilities = torch.tensor([0.02, 0.2, 0.05, 0.2, 0.1, 0.2, 0.03, 0.1] + [0.0125] * 8)
    logits = probabilities.log().expand(4000, -1).contiguous()
    for top_p, kept in ((0.15, {1}), (0.3, {1, 3}), (0.59, {1, 3, 5}), (0.69, {1, 3, 5, 4})):
        inputs = inputs_for(
            4000, temperature=1.0, top_p=top_p, sample_positions=torch.arange(4000)
        )  # fmt: skip
        inputs[9] = inputs[12] = inputs[15] = torch.zeros(4001, dtype=torch.int64)
        assert set(run(kernel(vocabulary), logits, inputs)[0].tolist()) == kept
