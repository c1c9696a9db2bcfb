"""merge_gate_up: fires, near misses by reason, numerics, a second run."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import torch

from aios_compile.passes.merge_gate_up import merge_gate_up
from tests.passes import helpers, level2

aios = torch.ops.aios


def test_two_projections_become_one() -> None:
    def f(x: "f32[T, 64]", wg: "weight bf16[96, 64]", wu: "weight bf16[96, 64]") -> Any:
        up, gate = aios.linear(x, wu), aios.linear(x, wg)
        return aios.gated_activation(gate, up, "gelu_tanh")

    module = helpers.check(merge_gate_up, f)
    assert helpers.targets(module) == ["aios.linear", "slice", "slice", "aios.gated_activation"]
    assert module.weights["gate_up_proj_weight"].names == ("wg", "wu")


def test_one_bias_is_enough() -> None:
    def f(
        x: "f32[T, 64]", wg: "weight f32[96, 64]", wu: "weight f32[96, 64]", b: "weight f32[96]"
    ) -> Any:
        return aios.gated_activation(aios.linear(x, wg), aios.linear(x, wu, b), "silu")

    helpers.check(merge_gate_up, f)


def test_another_user_is_refused() -> None:
    def f(x: "f32[T, 64]", wg: "weight f32[96, 64]", wu: "weight f32[96, 64]") -> Any:
        gate, up = aios.linear(x, wg), aios.linear(x, wu)
        return aios.gated_activation(gate, up, "silu"), up

    helpers.check(merge_gate_up, f, 0, reason="gate or up has another user")


def test_different_inputs_are_refused() -> None:
    def f(
        x: "f32[T, 64]", y: "f32[T, 64]", wg: "weight f32[96, 64]", wu: "weight f32[96, 64]"
    ) -> Any:
        return aios.gated_activation(aios.linear(x, wg), aios.linear(y, wu), "silu")

    helpers.check(merge_gate_up, f, 0, reason="gate and up project different inputs")


def test_one_projection_gating_itself_is_refused() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[96, 64]") -> Any:
        y = aios.linear(x, w)
        return aios.gated_activation(y, y, "silu")

    helpers.check(merge_gate_up, f, 0, reason="gate and up are one projection")


def test_computed_weights_are_refused() -> None:
    def f(x: "f32[T, 64]", wg: "weight f32[96, 64]", wu: "weight f32[96, 64]") -> Any:
        return aios.gated_activation(aios.linear(x, wg * 2), aios.linear(x, wu), "silu")

    helpers.check(merge_gate_up, f, 0, reason="a weight is computed in the graph, not loaded")


def test_one_hit_a_layer_region() -> None:
    module = level2.program(num_layers=3)
    before = helpers.evaluate(module, {"token_ids": torch.arange(7)})
    assert helpers.apply(merge_gate_up, module).hits == {"layer": 1, "": 0}
    helpers.assert_same(before, helpers.evaluate(module, {"token_ids": torch.arange(7)}))
    assert helpers.apply(merge_gate_up, module).total == 0
