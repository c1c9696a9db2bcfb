"""fuse_kv_write_into_attention: norms and ropes or none, near misses by reason, hits a layer."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

import functools
from typing import Any

import pytest

from aios_compile.passes.fuse_kv_write_into_attention import fuse_kv_write_into_attention
from tests.passes.test_fuse_qk_norm_rope_kv_write import attend, check_layers, norm, rope
from tests.passes.test_fuse_qk_norm_rope_kv_write import body as body_of_kind
from tests.passes.test_fuse_qk_norm_rope_kv_write import fused as dense

fused = functools.partial(dense, function=fuse_kv_write_into_attention)
body = functools.partial(body_of_kind, kind="kv_write_attention")


def test_norms_ropes_write_and_attention_are_one_kernel() -> None:
    def f(
        q: "f32[T, 4, 16]",
        k: "f32[T, 2, 16]",
        v: "f32[T, 2, 16]",
        t: "f32[T, 16]",
        a: "weight f32[16]",
    ) -> Any:
        return attend(rope(norm(q, a), t), rope(norm(k, a), t), v)

    names = ["rms_norm"] * 2 + ["rope"] * 2 + ["kv_write", "paged_attention"]
    assert sorted(body(fused(f))) == sorted(f"aios.{name}.default" for name in names)


def test_heads_that_are_read_as_they_are() -> None:
    def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]") -> Any:
        return attend(q, k, v)

    names = ["aios.kv_write.default", "aios.paged_attention.default"]
    assert sorted(body(fused(f))) == names


def test_different_tables_are_refused() -> None:
    def f(
        q: "f32[T, 4, 16]",
        k: "f32[T, 2, 16]",
        v: "f32[T, 2, 16]",
        t: "f32[T, 16]",
        u: "f32[T, 16]",
    ) -> Any:
        return attend(rope(q, t), rope(k, u), v)

    fused(f, 0, reason="queries and keys are rotated by different tables")


@pytest.mark.parametrize("qk_norm", [False, True])
def test_one_hit_a_layer_region_and_the_caches_stay_right(qk_norm: bool) -> None:
    check_layers(fuse_kv_write_into_attention, qk_norm)
