# ruff: noqa: F722
"""raise_sequence_lengths: the largest position becomes each token's own sequence length."""

import torch

from aios_compile.passes.raise_sequence_lengths import raise_sequence_lengths
from tests.passes.helpers import apply, captured, check, evaluate, targets

DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 4}


def test_the_length_and_the_largest_position():
    def f(positions: "input i64[T]"):
        last = positions.amax(-1, keepdim=True)
        return (last + 1) * positions, last.float() / 2 + positions

    module = check(raise_sequence_lengths, f, 1)
    assert set(module.inputs.values()) == {"positions", "sequence_lengths"}


def test_a_batch_of_one():
    def f(positions: "input i64[1, T]"):
        length = positions.max(-1, keepdim=True).values + 1
        return (length.expand_as(positions).float() ** 0.5)[..., None] * torch.arange(4)

    check(raise_sequence_lengths, f, 1)


def test_each_token_gets_its_own_sequence_length():
    def f(positions: "input i64[T]"):
        return positions * 0 + (positions.amax(-1, keepdim=True) + 1)

    module = check(raise_sequence_lengths, f, 1)
    lengths = torch.tensor([3, 3, 3, 4, 4, 4, 4])
    assert torch.equal(evaluate(module, {"sequence_lengths": lengths})[0], lengths)


def test_near_miss_one_number_for_all_tokens():
    def f(positions: "input i64[T]"):
        return positions * positions.max(), positions * positions.amax(-1)

    check(raise_sequence_lengths, f, 0, reason="one number")


def test_near_miss_another_input():
    def f(ids: "input i64[T]"):
        return ids.amax(-1, keepdim=True) + ids

    check(raise_sequence_lengths, f, 0)


def test_near_miss_meets_frequencies():
    def f(positions: "input i64[T]", inv_freq: "weight f32[4]"):
        return (positions.amax(-1, keepdim=True) + 1) * inv_freq

    check(raise_sequence_lengths, f, 0, reason="not the tokens'")


def test_near_miss_used_by_a_sum():
    def f(positions: "input i64[T]"):
        return positions.amax(-1, keepdim=True).sum()

    check(raise_sequence_lengths, f, 0, reason="not token by token")


def test_captured_decoder_with_dynamic_rope():
    module = captured("llama", **DYNAMIC)
    before = evaluate(module)
    assert apply(raise_sequence_lengths, module).hits == {"layer": 0, "": 1}
    assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
    assert "sequence_lengths" in module.inputs.values() and "amax" not in targets(module)
    assert apply(raise_sequence_lengths, module).total == 0
    shorter = torch.tensor([3, 3, 3, 7, 7, 7, 7])
    assert not torch.allclose(before[0], evaluate(module, {"sequence_lengths": shorter})[0])
