# ruff: noqa: F722, F821
"""raise_positions: tokens that the model counts itself get their sequence's positions."""

import torch

from aios_compile.passes.raise_positions import raise_positions
from aios_compile.passes.token_mixing import mixing_nodes
from tests.passes.helpers import apply, check, evaluate, trace

TWO_SEQUENCES = torch.tensor([5, 6, 7, 0, 1, 2, 3])


def test_counted_tokens_and_first_rows():
    def f(x: "f32[T, 8]", table: "weight f32[3, 64, 8]"):
        tokens = x.shape[0]
        count = torch.arange(tokens), torch.arange(2, tokens + 2, dtype=torch.float32)
        return x + table[1, :tokens] + table[:, 4 : tokens + 4].sum(0), *count

    module = check(raise_positions, f, 4)
    assert "positions" in module.inputs.values() and not mixing_nodes(module)
    _, count, shifted = evaluate(module, {"positions": TWO_SEQUENCES})
    assert torch.equal(count, TWO_SEQUENCES) and torch.equal(shifted, TWO_SEQUENCES + 2.0)


def test_rows_are_those_of_the_positions():
    def f(x: "f32[T, 8]", table: "weight f32[64, 8]"):
        return x * 0 + table[: x.shape[0]], table[0:1] * 0 + table[TWO_SEQUENCES.tolist()]

    rows, expected = evaluate(check(raise_positions, f, 1), {"positions": TWO_SEQUENCES})
    assert torch.equal(rows, expected)


def test_near_misses_mix_tokens():
    def f(x: "f32[T, 8]", table: "weight f32[64, 8]"):
        tokens = x.shape[0]
        return x + table[-tokens:], torch.arange(0, 2 * tokens, 2), x[:5], x[1:]

    module = trace(f)
    assert apply(raise_positions, module).total == 0
    assert len(mixing_nodes(module)) == 4


def test_near_miss_another_count():
    def f(x: "f32[T, 8]", table: "weight f32[64, 8]"):
        return x * torch.arange(8), x + table[:1], torch.arange(x.shape[0] // 1 + 3)

    check(raise_positions, f, 0)
