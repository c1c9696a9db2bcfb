# ruff: noqa: F821, UP037
"""Outputs that are inputs, parts or given out twice are copied; whole results are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aios_compile.passes.context import PassContext
from aios_compile.passes.own_outputs import own_outputs
from tests.passes.helpers import apply, trace
from tests.planted import programs

aten = torch.ops.aten


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


def test_views_that_a_region_is_given_are_copied_and_counted() -> None:
    """A count of none would let the runner pass over what changed, without a certificate."""
    module = programs.before("qwen3", "own_outputs")
    context = PassContext(module, "")
    (name,) = module.regions()
    call = module.calls(name)[0]
    x = next(a for a in call.args if a.meta["val"].dim() == 2 and a.meta["val"].shape[1] == 32)
    with module.root.graph.inserting_before(call):
        wide = context.call(module.root.graph, aten.cat.default, [x, x], -1, source=[x])
        view = context.call(module.root.graph, aten.slice.Tensor, wide, 1, 0, 32, source=[x])
    call.replace_input_with(x, view)
    hits = own_outputs(module.root.graph, context)
    copy = next(a for a in call.args if a in view.users)
    assert hits == 1 and copy.target is aten.clone.default
    assert copy.meta["val"].is_contiguous()
