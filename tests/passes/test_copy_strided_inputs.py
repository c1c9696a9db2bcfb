# ruff: noqa: F722, F821, UP037
"""A linear of a view with gaps reads a copy; dense rows are left alone, whatever their distance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aios_compile.ir import ops
from aios_compile.ir.module import Level
from aios_compile.ir.refresh import refresh
from aios_compile.passes.copy_strided_inputs import copy_strided_inputs
from aios_compile.passes.fuse_kv_write_into_attention import fuse_kv_write_into_attention
from aios_compile.passes.page_attention import page_attention
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


def a_rotation(x: "f32[T, 4, 16]", c: "f32[T, 1]", s: "f32[T, 32]") -> Any:
    return aios.rope(x, c.expand(-1, 16), s[:, ::2], False)


def chosen_experts(x: "f32[T, 1]", w: "weight f32[4, 8, 32]", e: "i64[T]") -> Any:
    return aios.expert_linear(x.expand(-1, 32), w, e)


def test_rope_and_experts_read_copies() -> None:
    """They had no emitter for such views: the compile was refused."""
    for function, copies in ((a_rotation, 2), (chosen_experts, 1)):
        module = trace(function)
        before = evaluate(module)
        assert apply(copy_strided_inputs, module).total == copies
        assert_same(before, evaluate(module))


def heads_by_heads(
    q: "f32[1, 4, T, 16]", k: "f32[2, T, 16]", v: "f32[2, T, 16]", w: "weight f32[16]"
) -> Any:
    """As SDPA wants them: the tokens of a head side by side."""
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    return aios.attention(aios.rms_norm(q[0], w, 1e-6, True), k, v, 0.25)


def test_heads_at_distances_of_t_are_copied_for_triton_and_then_have_a_kernel() -> None:
    """They had none: distances are constants there. The C++ target reads them where they are."""
    pytest.importorskip("triton")
    from aios_compile.codegen.emit_kernels import emit_kernels
    from aios_compile.codegen.triton.emitters import emitters_for
    from aios_compile.passes.form_kernels import form_kernels

    for target, copies in (("cpp", 0), ("triton", 3)):
        module = trace(heads_by_heads)
        assert apply(page_attention, module).total == 1
        refresh(module)
        assert apply(copy_strided_inputs, module, target).total == copies
        if target == "triton":
            assert apply(fuse_kv_write_into_attention, module, target).total == 1
            apply(form_kernels, module, target)
            module.level = Level.KERNELS
            names = [source.name for source in emit_kernels(module, emitters_for()).sources]
            assert any("kv_write_paged_attention" in name for name in names), names
