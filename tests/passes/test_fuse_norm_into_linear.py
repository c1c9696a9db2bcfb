"""fuse_norm_into_linear: with and without tails, near misses by reason, hits a layer."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import pytest
import torch

from aios_compile.passes.fuse_norm_into_linear import fuse_norm_into_linear
from tests.passes import helpers

aios = torch.ops.aios


def norm(x: Any, g: Any) -> Any:
    return aios.rms_norm(x, g, 1e-6, True)


TAILS = {
    "none": lambda y, x: y,
    "residual": lambda y, x: x + y,
    "activation": lambda y, x: torch.relu(y) ** 2,
    "halves": lambda y, x: aios.gated_activation(y[..., :32], y[..., 32:], "silu"),
}


@pytest.mark.parametrize("tail", TAILS)
def test_norm_linear_and_tail_are_one_kernel(tail: str) -> None:
    def f(x: "f32[T, 64]", g: "weight bf16[64]", w: "weight bf16[64, 64]") -> Any:
        return TAILS[tail](aios.linear(norm(x, g), w), x)

    module = helpers.check(fuse_norm_into_linear, f)
    (call,) = module.root.graph.find_nodes(op="call_module")
    assert call.meta["kernel"] == "linear" and str(call.target).startswith("rms_norm_linear")
    assert not [n for n in helpers.targets(module) if n.startswith("aios")]


def test_reshapes_between_and_a_norm_without_weight() -> None:
    def f(x: "f32[1, T, 64]", w: "weight f32[48, 64]") -> Any:
        return aios.linear(aios.rms_norm(x, None, 1e-6, True).view(-1, 64), w)

    helpers.check(fuse_norm_into_linear, f)


def test_near_misses_are_refused_by_name() -> None:
    def twice(x: "f32[T, 64]", g: "weight f32[64]", w: "weight f32[64, 64]") -> Any:
        h = norm(x, g)
        return aios.linear(h, w) + h

    def half(x: "bf16[T, 64]", g: "weight bf16[64]", w: "weight bf16[64, 64]") -> Any:
        return aios.linear(norm(x, g), w)

    def layer(x: "f32[T, 64]", g: "weight f32[64]", w: "weight f32[64, 64]") -> Any:
        return aios.linear(aios.layer_norm(x, g, None, 1e-6), w)

    def rows(
        x: "f32[T, 64]", g: "weight f32[64]", w: "weight f32[64, 64]", at: "input i64[R]"
    ) -> Any:
        return aios.linear(norm(x.index_select(0, at), g), w)

    def heads(x: "f32[T, 4, 16]", g: "weight f32[16]", w: "weight f32[64, 64]") -> Any:
        return aios.linear(norm(x, g).view(-1, 64), w)

    def parts(x: "f32[T, 64]", g: "weight f32[64]", w: "weight f32[48, 16]") -> Any:
        return aios.linear(norm(x, g).view(-1, 16), w)

    def expanded(x: "f32[T, 1]", g: "weight f32[64]", w: "weight f32[64, 64]") -> Any:
        return aios.linear(norm(x.expand(-1, 64), g), w)

    def column(x: "f32[T, 64]", g: "weight f32[64, 2]", w: "weight f32[64, 64]") -> Any:
        return aios.linear(norm(x, g[:, 0]), w)

    for function, reason in (
        (heads, "the norm's rows are not the linear's"),  # sub-norms of heads before o_proj
        (parts, "the norm's rows are not the linear's"),
        (expanded, "the norm reads rows with gaps"),
        (column, "the norm's weight has gaps"),
        (twice, "the normalised rows have another user"),
        (half, "the norm rounds its result to torch.bfloat16"),
        (layer, "a layer norm takes the mean off before the product"),
        (rows, "the norm gathers the rows that it reads"),
    ):
        values = {"at": torch.zeros(3, dtype=torch.int64)}
        helpers.check(fuse_norm_into_linear, function, 0, reason=reason, values=values)


def test_a_plain_linear_is_no_near_miss() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64, 64]") -> Any:
        return aios.linear(x, w)

    applied = helpers.apply(fuse_norm_into_linear, helpers.trace(f))
    assert applied.total == 0 and not applied.refusals


def test_a_tail_that_does_not_fit_is_told_and_stays_outside() -> None:
    def f(x: "f32[T, 64]", g: "weight f32[64]", w: "weight f32[64, 64]") -> Any:
        y = aios.linear(norm(x, g), w)
        return torch.relu(y), torch.cumsum(y, 0)

    module = helpers.check(fuse_norm_into_linear, f, reason="another user")
    assert "relu" in helpers.targets(module)
