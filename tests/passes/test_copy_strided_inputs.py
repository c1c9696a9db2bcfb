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
