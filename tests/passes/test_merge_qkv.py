"""merge_qkv: fires, near misses by reason, numerics, a second run, captured layers."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import pytest
import torch

from aios_compile.passes.merge_qkv import merge_qkv
from aios_compile.passes.page_attention import page_attention
from tests.passes import helpers, level2

aios = torch.ops.aios


def heads(x: Any, w: Any, bias: Any = None) -> Any:
    return aios.linear(x, w, bias).unflatten(-1, (-1, 16))


def test_three_projections_become_one() -> None:
    def f(
        x: "f32[T, 64]",
        wq: "weight f32[64, 64]",
        wk: "weight f32[32, 64]",
        wv: "weight f32[32, 64]",
    ) -> Any:
        return aios.attention(heads(x, wq), heads(x, wk), heads(x, wv), 0.25)

    module = helpers.check(merge_qkv, f)
    assert helpers.targets(module)[:4] == ["aios.linear", "slice", "slice", "slice"]
    assert module.weights["qkv_proj_weight"].names == ("wq", "wk", "wv")


def test_missing_biases_are_zeros() -> None:
    def f(
        x: "f32[T, 64]",
        wq: "weight f32[64, 64]",
        bq: "weight f32[64]",
        wk: "weight f32[32, 64]",
        wv: "weight f32[32, 64]",
        bv: "weight f32[32]",
    ) -> Any:
        return aios.attention(heads(x, wq, bq), heads(x, wk), heads(x, wv, bv), 0.25)

    module = helpers.check(merge_qkv, f)
    assert module.weights["qkv_proj_bias"].names == ("bq", "bv")
    assert "new_zeros" in module.weights["qkv_proj_bias"].text()


def test_keys_that_are_values_make_a_pair() -> None:
    def f(x: "f32[T, 64]", wq: "weight f32[64, 64]", wk: "weight f32[32, 64]") -> Any:
        k = heads(x, wk)
        return aios.attention(heads(x, wq), k, k, 0.25)

    helpers.check(merge_qkv, f)


def test_a_parallel_mlp_over_the_same_input_stays_apart() -> None:
    def f(
        x: "f32[T, 64]",
        up: "weight f32[96, 64]",
        wq: "weight f32[64, 64]",
        wk: "weight f32[64, 64]",
        wv: "weight f32[64, 64]",
        down: "weight f32[64, 96]",
    ) -> Any:
        mlp = aios.linear(torch.relu(aios.linear(x, up)), down)
        out = aios.attention(heads(x, wq), heads(x, wk), heads(x, wv), 0.25)
        return mlp + out.flatten(-2)

    module = helpers.check(merge_qkv, f)
    assert helpers.targets(module).count("aios.linear") == 3


def test_different_inputs_are_left_alone() -> None:
    def f(
        x: "f32[T, 64]",
        y: "f32[T, 64]",
        wq: "weight f32[64, 64]",
        wk: "weight f32[64, 64]",
    ) -> Any:
        k = heads(y, wk)
        return aios.attention(heads(x, wq), k, k, 0.25)

    helpers.check(merge_qkv, f, 0)


def test_computed_weights_are_refused() -> None:
    def f(x: "f32[T, 64]", wq: "weight f32[64, 64]", wk: "weight f32[64, 64]") -> Any:
        k = heads(x, wk * 2)
        return aios.attention(heads(x, wq), k, k, 0.25)

    helpers.check(merge_qkv, f, 0, reason="a weight is computed in the graph, not loaded")


def test_weights_of_different_dtypes_are_refused() -> None:
    def f(x: "f32[T, 64]", wq: "weight f32[64, 64]", wk: "weight bf16[64, 64]") -> Any:
        k = heads(x, wk)
        return aios.attention(heads(x, wq), k, k, 0.25)

    helpers.check(merge_qkv, f, 0, reason="weights of different dtypes")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", [(), (page_attention,)])
def test_one_hit_a_layer_region_before_and_after_paging(bias: bool, first: tuple[Any, ...]) -> None:
    module = level2.program(bias=bias)
    for function in first:
        helpers.apply(function, module)
    assert helpers.apply(merge_qkv, module).hits == {"layer": 1, "": 0}
    assert helpers.apply(merge_qkv, module).total == 0
    names = [r.names for n, r in module.weights.items() if n.endswith("qkv_proj_weight")]
    assert names == [tuple(f"layers.{i}.{p}.weight" for p in "qkv") for i in range(2)]


def test_slices_carry_the_strides_of_the_merged_result() -> None:
    module = level2.program()
    helpers.apply(merge_qkv, module)
    views = [n for n in module.regions()["layer"].graph.nodes if n.name.startswith("view")][:3]
    assert [n.meta["val"].stride() for n in views] == [(64, 8, 1)] * 3
