"""fuse_linear_epilogue: tails of every form, near misses by reason, numerics, a second run."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import pytest
import torch

from aios_compile.passes.fuse_add_rms_norm import fuse_add_rms_norm
from aios_compile.passes.fuse_linear_epilogue import fuse_linear_epilogue
from aios_compile.passes.merge_gate_up import merge_gate_up
from tests.passes import helpers, level2

aios = torch.ops.aios
TAILS = {
    "residual": lambda y, x, b: x + y,
    "bias": lambda y, x, b: y + b,
    "activation": lambda y, x, b: torch.relu(y) ** 2,
    "soft_cap": lambda y, x, b: torch.tanh(y / 30.0) * 30.0,
    "cast": lambda y, x, b: (y * 0.5).to(torch.bfloat16),
    "spelled_out_silu": lambda y, x, b: y * torch.sigmoid(y) + x,
    "row_scale": lambda y, x, b: y * x[:, :1],
}


@pytest.mark.parametrize("tail", TAILS)
def test_the_whole_tail_is_one_kernel(tail: str) -> None:
    def f(x: "f32[T, 64]", w: "weight bf16[64, 64]", b: "weight f32[64]") -> Any:
        return TAILS[tail](aios.linear(x, w), x, b)

    module = helpers.check(fuse_linear_epilogue, f)
    (call,) = module.root.graph.find_nodes(op="call_module")
    assert call.meta["kernel"] == "linear"
    assert set(helpers.targets(module)) <= {"slice"}


HALVES = {
    "slices": lambda y: (y[..., :96], y[..., 96:]),
    "chunk": lambda y: y.chunk(2, -1),
    "split": lambda y: y.split([96, 96], 1),
}


@pytest.mark.parametrize("how", HALVES)
def test_the_gated_activation_of_both_halves(how: str) -> None:
    def f(x: "f32[T, 64]", w: "weight f32[192, 64]", r: "f32[T, 96]") -> Any:
        gate, up = HALVES[how](aios.linear(x, w))
        return aios.gated_activation(gate.clamp(max=7.0), up + 1, "gelu_tanh") + r

    module = helpers.check(fuse_linear_epilogue, f)
    assert set(helpers.targets(module)) <= {"slice"}  # of nothing: dead after eliminate_views


def test_the_gated_activation_behind_merge_gate_up() -> None:
    module = level2.program()
    assert helpers.apply(merge_gate_up, module).total == 1
    assert helpers.apply(fuse_linear_epilogue, module).hits["layer"] == 3
    names = {str(n.target) for n in module.regions()["layer"].graph.nodes}
    assert {"linear_gated_activation", "linear_add"} <= names


def test_an_embedding_takes_its_cast_and_scale() -> None:
    def f(ids: "input i64[T]", table: "weight bf16[9, 64]") -> Any:
        return torch.nn.functional.embedding(ids, table).float() * 8.0

    module = helpers.check(fuse_linear_epilogue, f)
    (call,) = module.root.graph.find_nodes(op="call_module")
    assert call.meta["kernel"] == "embedding"


def test_the_second_linear_takes_the_product() -> None:
    def f(x: "f32[T, 64]", a: "weight f32[64, 64]", b: "weight f32[64, 64]") -> Any:
        return torch.relu(aios.linear(x, a)) * aios.linear(x, b)

    helpers.check(fuse_linear_epilogue, f)


def test_a_result_with_another_user_is_refused() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64, 64]", v: "weight f32[64, 64]") -> Any:
        y = aios.linear(x, w)
        return torch.relu(y) + x, aios.linear(y, v)

    helpers.check(fuse_linear_epilogue, f, 0, reason="another user, linear_1")


def test_a_tail_of_another_shape_is_refused() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[1, 64]") -> Any:
        return aios.linear(x, w) * x

    helpers.check(fuse_linear_epilogue, f, 0, reason="has another shape")


def test_values_that_never_meet_are_refused() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64, 64]") -> Any:
        y = aios.linear(x, w)
        return torch.relu(y), torch.sigmoid(y)

    helpers.check(fuse_linear_epilogue, f, 0, reason="another user, output")


def test_slices_that_are_no_halves_stay_views() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[96, 64]") -> Any:
        y = aios.linear(x, w)
        return y[:, :32] * y[:, 32:64] + y[:, 64:]

    helpers.check(fuse_linear_epilogue, f, 0)


def test_halves_that_start_inside_a_block_are_refused() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[40, 64]") -> Any:
        gate, up = aios.linear(x, w).chunk(2, -1)
        return aios.gated_activation(gate, up, "silu")

    helpers.check(fuse_linear_epilogue, f, 0, reason="halves of 20 columns, no multiple of 16")


def test_halves_that_are_used_apart_are_refused() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64, 64]") -> Any:
        gate, up = aios.linear(x, w).chunk(2, -1)
        return torch.relu(gate), up

    helpers.check(fuse_linear_epilogue, f, 0, reason="another user, output")


def test_a_tail_in_double_precision_is_refused() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64, 64]") -> Any:
        return aios.linear(x, w).double() * 2

    helpers.check(fuse_linear_epilogue, f, 0, reason="has no 32-bit vector type")


def test_the_tail_stops_at_a_norm() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64, 64]", n: "weight f32[64]") -> Any:
        return aios.rms_norm(x + aios.linear(x, w), n, 1e-6, True)

    module = helpers.check(fuse_linear_epilogue, f)
    assert helpers.targets(module) == ["aios.rms_norm"]


def test_hits_of_a_layer_after_the_norms() -> None:
    module = level2.program()
    for function in (merge_gate_up, fuse_add_rms_norm):
        helpers.apply(function, module)
    assert helpers.apply(fuse_linear_epilogue, module).hits == {"layer": 2, "": 0}
    assert helpers.apply(fuse_linear_epilogue, module).total == 0
