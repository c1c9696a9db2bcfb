# ruff: noqa: F722, F821, UP037
"""A linear of a view with gaps reads a copy; dense rows are left alone, whatever their distance."""

from __future__ import annotations

from typing import Any

import torch

from aios_compile.ir import ops
from aios_compile.passes.copy_strided_inputs import copy_strided_inputs
from tests.passes.helpers import apply, assert_same, evaluate, trace

aios = torch.ops.aios
assert ops.TABLE


def every_second(x: "f32[T, 64]", w: "weight f32[16, 32]") -> Any:
    return aios.linear(x[:, ::2], w)


def one_column(x: "f32[T, 2]", w: "weight f32[16, 1]") -> Any:
    return aios.linear(x[:, 1::2], w)


def a_part_of_each_row(x: "f32[T, 64]", w: "weight f32[16, 32]") -> Any:
    return aios.linear(x[:, 32:], w)


def test_fires_and_keeps_the_values() -> None:
    for function in (every_second, one_column):
        module = trace(function)
        before = evaluate(module)
        assert apply(copy_strided_inputs, module).total == 1
        assert_same(before, evaluate(module))
        assert apply(copy_strided_inputs, module).total == 0, "a second run still fires"


def test_dense_rows_are_left_alone() -> None:
    assert apply(copy_strided_inputs, trace(a_part_of_each_row)).total == 0


def a_rotation(x: "f32[T, 4, 16]", c: "f32[T, 1]", s: "f32[T, 32]") -> Any:
    return aios.rope(x, c.expand(-1, 16), s[:, ::2], False)


def chosen_experts(x: "f32[T, 1]", w: "weight f32[4, 8, 32]", e: "i64[T]") -> Any:
    return aios.expert_linear(x.expand(-1, 32), w, e)


def test_rope_and_experts_read_copies() -> None:
    """They had no emitter for such views: the compile was refused."""
    for function, copies in ((a_rotation, 2), (chosen_experts, 1)):
        module = trace(function)
        before = evaluate(module)
        assert apply(copy_strided_inputs, module).total == copies
        assert_same(before, evaluate(module))
