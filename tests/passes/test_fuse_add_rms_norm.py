"""fuse_add_rms_norm: both forms, two results, near misses by reason, numerics, a second run."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import pytest
import torch

from aios_compile.ir.module import body_of
from aios_compile.passes.fuse_add_rms_norm import fuse_add_rms_norm
from aios_compile.passes.page_attention import page_attention
from tests.passes import helpers, level2

aios = torch.ops.aios


def test_a_sum_that_is_used_again_is_a_second_result() -> None:
    def f(x: "f32[T, 64]", h: "f32[T, 64]", n: "weight f32[64]", w: "weight f32[64, 64]") -> Any:
        y = x + h
        return y + aios.linear(aios.rms_norm(y, n, 1e-6, True), w)

    module = helpers.check(fuse_add_rms_norm, f)
    (call,) = module.root.graph.find_nodes(op="call_module", target="add_rms_norm")
    assert call.meta["kernel"] == body_of(call).meta["kernel"] == "row_reduction"
    assert len(call.meta["val"]) == 2


def test_a_sum_that_is_not_used_again_stays_inside() -> None:
    def f(x: "f32[T, 64]", h: "f32[T, 64]", w: "weight f32[64]") -> Any:
        return aios.rms_norm(x + h, w, 1e-6, False)

    module = helpers.check(fuse_add_rms_norm, f)
    assert helpers.targets(module) == []


def test_layer_norm_too() -> None:
    def f(x: "f32[T, 64]", h: "f32[T, 64]", w: "weight f32[64]", b: "weight f32[64]") -> Any:
        return aios.layer_norm(x + h, w, b, 1e-5)

    helpers.check(fuse_add_rms_norm, f)


def test_the_mirrored_form_of_post_norms() -> None:
    def f(x: "f32[T, 64]", h: "f32[T, 64]", w: "weight f32[64]") -> Any:
        return x + aios.rms_norm(h, w, 1e-6, True)

    module = helpers.check(fuse_add_rms_norm, f)
    assert module.root.graph.find_nodes(op="call_module", target="rms_norm_add")


def test_a_chain_fuses_the_sum_with_the_norm_behind_it() -> None:
    def f(x: "f32[T, 64]", h: "f32[T, 64]", a: "weight f32[64]", b: "weight f32[64]") -> Any:
        y = x + aios.rms_norm(h, a, 1e-6, True)
        return y, aios.rms_norm(y, b, 1e-6, True)

    module = helpers.check(fuse_add_rms_norm, f)
    assert helpers.targets(module)[0] == "aios.rms_norm"


REFUSED = {
    "the sum adds a number, not a residual": lambda x, h, w: aios.rms_norm(x + 1.0, w, 1e-6, True),
    "the summands have different shapes": lambda x, h, w: aios.rms_norm(x + w, w, 1e-6, True),
    "the summands have different dtypes": lambda x, h, w: aios.rms_norm(
        x + h.bfloat16(), w, 1e-6, True
    ),
    "the sum is scaled by alpha": lambda x, h, w: aios.rms_norm(
        torch.add(x, h, alpha=2), w, 1e-6, True
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_near_misses(reason: str) -> None:
    def f(x: "f32[T, 64]", h: "f32[T, 64]", w: "weight f32[64]") -> Any:
        return REFUSED[reason](x, h, w)

    helpers.check(fuse_add_rms_norm, f, 0, reason=reason)


def test_a_normalised_branch_with_another_user_is_refused() -> None:
    def f(x: "f32[T, 64]", h: "f32[T, 64]", w: "weight f32[64]") -> Any:
        y = aios.rms_norm(h, w, 1e-6, True)
        return x + y, y

    reason = "the normalised branch has another user"
    helpers.check(fuse_add_rms_norm, f, 0, reason=reason)


def test_users_between_the_sum_and_the_norm_move_behind_the_kernel() -> None:
    def f(x: "f32[T, 64]", h: "f32[T, 64]", w: "weight f32[64]") -> Any:
        y = x + h
        z = y * 2
        return z, aios.rms_norm(y, w, 1e-6, True)

    helpers.check(fuse_add_rms_norm, f)


@pytest.mark.parametrize("first", [(), (page_attention,)])
def test_one_hit_a_layer_region(first: tuple[Any, ...]) -> None:
    module = level2.program()
    for function in first:
        helpers.apply(function, module)
    assert helpers.apply(fuse_add_rms_norm, module).hits == {"layer": 1, "": 0}
    assert helpers.apply(fuse_add_rms_norm, module).total == 0
