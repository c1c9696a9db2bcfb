"""form_kernels: kinds, what stays a view, reshapes that need a copy, level 3 of a whole decoder."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import torch

from aios_compile.ir.module import IRModule, Level, is_kernel_call
from aios_compile.ir.verifier import verify
from aios_compile.passes.form_kernels import form_kernels
from aios_compile.passes.fuse_add_rms_norm import fuse_add_rms_norm
from aios_compile.passes.fuse_linear_epilogue import fuse_linear_epilogue
from aios_compile.passes.fuse_pointwise import fuse_pointwise
from aios_compile.passes.fuse_qk_norm_rope_kv_write import fuse_qk_norm_rope_kv_write
from aios_compile.passes.gather_last_tokens import gather_last_tokens
from aios_compile.passes.merge_gate_up import merge_gate_up
from aios_compile.passes.merge_qkv import merge_qkv
from aios_compile.passes.page_attention import page_attention
from aios_compile.passes.sample_tokens import sample_tokens
from tests.passes import helpers, level2

aios = torch.ops.aios
PASSES = (
    page_attention,
    gather_last_tokens,
    sample_tokens,
    merge_qkv,
    merge_gate_up,
    fuse_qk_norm_rope_kv_write,
    fuse_add_rms_norm,
    fuse_linear_epilogue,
    fuse_pointwise,
    form_kernels,
)


def kinds(module: IRModule, region: str = "") -> list[str]:
    nodes = module.graphs()[region].graph.nodes
    return [n.meta["kernel"] for n in nodes if is_kernel_call(n)]


def test_every_kind() -> None:
    def f(
        ids: "input i64[T]",
        table: "weight f32[9, 64]",
        w: "weight f32[64, 64]",
        n: "weight f32[64]",
    ) -> Any:
        x = torch.nn.functional.embedding(ids, table)
        y = aios.rms_norm(aios.linear(x, w), n, 1e-6, True)
        return torch.cat((x, y.softmax(-1)), 0).exp().mm(w), y.sum(-1), table.index_select(0, ids)

    module = helpers.check(form_kernels, f, 9)
    assert set(kinds(module)) == {
        *("embedding", "linear", "row_reduction", "pointwise", "matmul", "gather")
    }


def test_an_unknown_op_is_its_own_kind() -> None:
    def f(x: "f32[T, 64]") -> Any:
        return x.cumprod(-1)

    assert kinds(helpers.check(form_kernels, f)) == ["cumprod"]


def test_views_stay_outside() -> None:
    def f(x: "f32[T, 64]") -> Any:
        return x.exp().view(-1, 4, 16).transpose(0, 1)[1:3, :, None]

    module = helpers.check(form_kernels, f)
    assert set(helpers.targets(module)) == {"view", "permute", "slice", "unsqueeze"}


def test_a_reshape_that_strides_do_not_allow_is_a_copy_and_a_view() -> None:
    def f(x: "f32[T, 4, 16]") -> Any:
        return torch.ops.aten.reshape.default(x.transpose(0, 1), [4, -1])

    module = helpers.trace(f)
    before = helpers.evaluate(module)
    assert helpers.apply(form_kernels, module).total == 1
    helpers.assert_same(before, helpers.evaluate(module))
    assert helpers.targets(module) == ["permute", "view"]
    assert kinds(module) == ["pointwise"]


def test_results_of_one_op_are_picked_from_one_kernel() -> None:
    def f(
        k: "f32[T, 2, 16]",
        v: "f32[T, 2, 16]",
        k_cache: "f32[4, 2, 16, 16]",
        v_cache: "f32[4, 2, 16, 16]",
        slots: "input i64[T]",
    ) -> Any:
        return aios.kv_write(k, v, k_cache, v_cache, slots)

    assert kinds(helpers.check(form_kernels, f)) == ["kv_write"]


def test_a_decoder_reaches_level_3() -> None:
    module = level2.program()
    for function in PASSES:
        assert helpers.apply(function, module).total, function
        verify(module)
    module.level = Level.KERNELS
    verify(module)
    assert kinds(module, "layer") == [
        *("row_reduction", "linear", "qk_norm_rope_kv_write", "paged_attention", "linear"),
        *("row_reduction", "linear", "linear"),
    ]
    assert kinds(module) == [*("pointwise", "embedding", "row_reduction", "linear", "sample")]


def test_level_3_computes_what_level_2_does() -> None:
    ids = list(range(5, 38))
    values = {"token_ids": torch.tensor(ids), "positions": torch.arange(len(ids))}
    (want,) = helpers.evaluate(level2.program(), values, len(ids))
    module = level2.program()
    for function in PASSES:
        if function is not sample_tokens:
            helpers.apply(function, module)
    caches = level2.empty_caches(module)
    parts = [
        level2.step(module, [(ids[a:b], a, [6, 2, 9])], caches)["logits"]
        for a, b in ((0, 16), (16, 17), (17, 33))
    ]
    helpers.assert_same([want], [torch.cat(parts)])
