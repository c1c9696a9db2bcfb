"""fuse_pointwise: pointwise and row-reduction groups, what stays apart, numerics, a second run."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import torch

from aios_compile.ir.module import IRModule, body_of
from aios_compile.passes.fuse_pointwise import fuse_pointwise
from tests.passes import helpers, level2

aios = torch.ops.aios


def kinds(module: IRModule) -> list[str]:
    return [n.meta["kernel"] for n in module.root.graph.nodes if n.op == "call_module"]


def test_a_chain_and_its_siblings_are_one_kernel() -> None:
    def f(x: "f32[T, 64]", y: "f32[T, 64]", b: "weight f32[64]") -> Any:
        z = (x * y + b).tanh()
        return z * x, y.exp()

    module = helpers.check(fuse_pointwise, f)
    assert kinds(module) == ["pointwise"]
    assert len(helpers.targets(module)) == 2  # the results are picked


def test_rotary_tables_are_one_kernel() -> None:
    def f(positions: "input i64[T]", inverse: "weight f32[8]") -> Any:
        angles = positions[:, None].float() * inverse
        both = torch.cat((angles, angles), -1)
        return both.cos() * 1.5, both.sin() * 1.5

    module = helpers.check(fuse_pointwise, f)
    assert kinds(module) == ["pointwise"]
    (call,) = module.root.graph.find_nodes(op="call_module")
    inside = [str(n.target) for n in body_of(call).graph.nodes if n.op == "call_function"]
    assert "aten.cat.default" in inside and "aten.unsqueeze.default" not in inside


def test_a_spelled_out_softmax_is_one_row_reduction() -> None:
    def f(x: "f32[T, 64]") -> Any:
        e = torch.exp(x * 2 - (x * 2).amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    assert kinds(helpers.check(fuse_pointwise, f)) == ["row_reduction"]


def test_an_unknown_norm_is_one_row_reduction() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64]") -> Any:
        y = torch.relu(x)
        return y / (y.abs().mean(-1, keepdim=True) + 1e-3) * w

    assert kinds(helpers.check(fuse_pointwise, f)) == ["row_reduction"]


def test_a_norm_takes_its_prologue_and_epilogue() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64]", m: "weight f32[64, 64]") -> Any:
        return aios.linear(torch.relu(aios.rms_norm(x * 3, w, 1e-6, True)), m)

    module = helpers.check(fuse_pointwise, f)
    assert kinds(module) == ["row_reduction"]


def test_a_reduction_may_return_one_value_a_row() -> None:
    def f(x: "f32[T, 64]") -> Any:
        return (x * x).sum(-1)

    assert kinds(helpers.check(fuse_pointwise, f)) == ["row_reduction"]


def test_different_shapes_stay_apart() -> None:
    def f(x: "f32[T, 64]", y: "f32[T, 32]") -> Any:
        return (x * 2).exp(), (y * 2).exp()

    helpers.check(fuse_pointwise, f, 2)


def test_a_value_that_escapes_is_not_computed_twice() -> None:
    def f(s: "f32[T, 1]", x: "f32[T, 64]") -> Any:
        scale = s.exp()
        return scale, (x * scale).tanh()

    module = helpers.check(fuse_pointwise, f)
    assert helpers.targets(module) == ["exp"]


def test_a_path_through_a_linear_keeps_a_group_convex() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64, 64]") -> Any:
        y = x.exp() * 2
        return (aios.linear(y, w) + y).tanh()

    helpers.check(fuse_pointwise, f, 2)


def test_views_between_are_inside_and_views_around_are_outside() -> None:
    def f(x: "f32[T, 64]", y: "f32[T, 4, 16]") -> Any:
        return ((x * 2).view(-1, 4, 16) + y.transpose(0, 1).transpose(0, 1)).view(-1, 64)

    module = helpers.check(fuse_pointwise, f)
    names = helpers.targets(module)
    assert names.count("view") == 1 and names.count("permute") == 2


def test_a_single_op_is_left_to_form_kernels() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64]") -> Any:
        return aios.rms_norm(x, w, 1e-6, True)

    helpers.check(fuse_pointwise, f, 0)


def test_random_numbers_are_left_alone() -> None:
    def f(x: "f32[T, 64]") -> Any:
        return torch.bernoulli(x) * 2

    module = helpers.trace(f)
    helpers.apply(fuse_pointwise, module)
    assert "rand" in helpers.targets(module)


def test_only_the_tables_are_left_in_a_decoder() -> None:
    module = level2.program()
    hits = helpers.apply(fuse_pointwise, module).hits
    assert hits == {
        "layer": 1,
        "": 1,
    }  # in a layer add and rms_norm, when fuse_add_rms_norm has not run
    assert helpers.apply(fuse_pointwise, module).total == 0


def test_a_norm_gathers_its_own_rows() -> None:
    def f(x: "f32[T, 64]", rows: "input i64[R]", w: "weight f32[64]") -> Any:
        return aios.rms_norm(x.index_select(0, rows), w, 1e-6, True)

    module = helpers.check(fuse_pointwise, f, values={"rows": torch.tensor([0, 0, 0])})
    assert kinds(module) == ["row_reduction"]
