# ruff: noqa: F821, UP037
"""Outputs that are inputs, parts or given out twice are copied; whole results are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aios_compile.passes.own_outputs import own_outputs
from tests.passes.helpers import apply, trace


def part(x: "f32[T, 64]") -> Any:
    return torch.relu(x)[:, :32]


def turned(x: "f32[T, 64]") -> Any:
    return torch.relu(x).transpose(0, 1)


def handed_through(x: "f32[T, 64]") -> Any:
    return torch.relu(x), x


def twice(x: "f32[T, 64]") -> Any:
    y = torch.relu(x)
    return y, y


def half_of_a_split(x: "f32[T, 64]") -> Any:
    return torch.relu(x).split(32, -1)[1]


def whole(x: "f32[T, 64]") -> Any:
    return torch.relu(x)


def reshaped(x: "f32[T, 64]") -> Any:
    return torch.relu(x).view(-1, 4, 16)


@pytest.mark.parametrize("function", [part, turned, handed_through, twice, half_of_a_split])
def test_fires(function: Callable[..., Any]) -> None:
    module = trace(function)
    assert apply(own_outputs, module).total == 1
    assert apply(own_outputs, module).total == 0, "a second run still fires"


@pytest.mark.parametrize("function", [whole, reshaped])
def test_a_whole_result_is_left_alone(function: Callable[..., Any]) -> None:
    assert apply(own_outputs, trace(function)).total == 0


def test_values_stay() -> None:
    module = trace(part)
    x = torch.randn(7, 64)
    before = module.root(x)
    apply(own_outputs, module)
    after = module.root(x)
    assert torch.equal(before[0], after[0]) and after[0].is_contiguous()
