"""fuse_qk_norm_rope_kv_write: with and without norms and rope, views between, near misses."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import pytest
import torch

from aios_compile.ir.module import IRModule, body_of, is_kernel_call, outputs
from aios_compile.ir.verifier import verify
from aios_compile.passes.fuse_qk_norm_rope_kv_write import fuse_qk_norm_rope_kv_write
from aios_compile.passes.page_attention import page_attention
from tests.passes import helpers, level2

aios = torch.ops.aios
IDS = list(range(3, 36))


def norm(x: Any, w: Any) -> Any:
    return aios.rms_norm(x, w, 1e-6, True)


def rope(x: Any, table: Any) -> Any:
    return aios.rope(x, table, table, False)


def attend(q: Any, k: Any, v: Any) -> Any:
    return aios.attention(q, k, v, 0.25)


def fused(
    example: Any, hits: int = 1, reason: str = "", function: Any = fuse_qk_norm_rope_kv_write
) -> IRModule:
    """Page a function's attention, fuse, and compare with dense attention of one sequence."""
    module = helpers.trace(example)
    (want,) = helpers.evaluate(module)
    assert helpers.apply(page_attention, module).total == 1
    applied = helpers.apply(function, module)
    assert applied.total == hits, applied
    assert not reason or reason in applied.refusals, applied.refusals
    values = {
        "slots": torch.arange(7) + 32,
        "query_starts": torch.tensor([0, 7]),
        "context_lengths": torch.tensor([7]),
        "page_tables": torch.tensor([[2]]),
        "k_cache": torch.full((64, 2, 16, 16), 1e3),
        "v_cache": torch.full((64, 2, 16, 16), 1e3),
    }
    helpers.assert_same([want], helpers.evaluate(module, values)[:1])
    assert helpers.apply(function, module).total == 0
    return module


def check_layers(function: Any, qk_norm: bool) -> None:
    """One hit a layer region; three steps through permuted pages equal dense attention."""
    module = level2.program(qk_norm=qk_norm)
    values = {"token_ids": torch.tensor(IDS), "positions": torch.arange(len(IDS))}
    (want,) = helpers.evaluate(module, values, len(IDS))
    helpers.apply(page_attention, module)
    assert helpers.apply(function, module).hits == {"layer": 1, "": 0}
    verify(module)
    assert len(outputs(module.regions()["layer"].graph)) == 3
    caches = level2.empty_caches(module)
    parts = [
        level2.step(module, [(IDS[a:b], a, [3, 7, 2])], caches)["logits"]
        for a, b in ((0, 30), (30, 31), (31, 33))
    ]
    helpers.assert_same([want], [torch.cat(parts)])
    assert helpers.apply(function, module).total == 0


def body(module: IRModule, kind: str = "qk_norm_rope_kv_write") -> list[str]:
    (call,) = (n for n in module.root.graph.nodes if n.op == "call_module" and is_kernel_call(n))
    assert call.meta["kernel"] == kind
    calls = [n for n in body_of(call).graph.nodes if n.op == "call_function"]
    return [str(n.target) for n in calls if "getitem" not in str(n.target)]


def test_norms_and_rope() -> None:
    def f(
        q: "f32[T, 4, 16]",
        k: "f32[T, 2, 16]",
        v: "f32[T, 2, 16]",
        t: "f32[T, 16]",
        a: "weight f32[16]",
        b: "weight f32[16]",
    ) -> Any:
        return attend(rope(norm(q, a), t), rope(norm(k, b), t), v)

    module = fused(f)
    names = ["aios.rms_norm.default"] * 2 + ["aios.rope.default"] * 2 + ["aios.kv_write.default"]
    assert sorted(body(module)) == sorted(names)


def test_rope_alone() -> None:
    def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]", t: "f32[T, 8]") -> Any:
        return attend(rope(q, t), rope(k, t), v)

    module = fused(f)
    assert str(module.root.graph.find_nodes(op="call_module")[0].target) == "qk_rope_kv_write"


def test_norms_alone() -> None:
    def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]", a: "weight f32[16]") -> Any:
        return attend(norm(q, a), norm(k, a), v)

    fused(f)


def test_nothing_before_the_write_is_no_match() -> None:
    def f(q: "f32[T, 4, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]") -> Any:
        return attend(q, k, v)

    fused(f, 0)


def test_layout_views_behind_a_norm_move_before_it() -> None:
    def f(x: "f32[1, T, 64]", y: "f32[1, T, 32]", v: "f32[T, 2, 16]", a: "weight f32[16]") -> Any:
        q = norm(x.view(1, -1, 4, 16).transpose(1, 2), a)  # as transformers: heads first
        k = norm(y.view(1, -1, 2, 16).transpose(1, 2), a)
        return attend(q[0].transpose(0, 1), k[0].transpose(0, 1), v)

    assert sorted(body(fused(f))) == sorted(
        ["aios.rms_norm.default"] * 2 + ["aios.kv_write.default"]
    )


def test_layout_views_behind_a_rope_move_before_it() -> None:
    def f(
        x: "f32[1, T, 64]",
        y: "f32[1, T, 32]",
        v: "f32[T, 2, 16]",
        t: "f32[1, T, 16]",
        a: "weight f32[16]",
    ) -> Any:
        q = rope(norm(x.view(1, -1, 4, 16), a), t).transpose(1, 2)
        k = rope(norm(y.view(1, -1, 2, 16), a), t).transpose(1, 2)
        return attend(q[0].transpose(0, 1), k[0].transpose(0, 1), v)

    assert len(body(fused(f))) == 5


def test_heads_that_change_places_are_refused() -> None:
    def f(q: "f32[T, 2, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]", t: "f32[T, 16]") -> Any:
        q = rope(q, t).view(-1, 16, 2).transpose(1, 2)
        return attend(q, rope(k, t), v)

    fused(f, 0, "heads are rearranged behind rope")


def test_a_norm_over_all_heads_stays_outside() -> None:
    def f(
        x: "f32[T, 64]",
        k: "f32[T, 2, 16]",
        v: "f32[T, 2, 16]",
        t: "f32[T, 16]",
        a: "weight f32[64]",
    ) -> Any:
        return attend(rope(norm(x, a).view(-1, 4, 16), t), rope(k, t), v)

    module = fused(f)
    assert helpers.targets(module)[0] == "aios.rms_norm"


def test_different_tables_are_refused() -> None:
    def f(
        q: "f32[T, 4, 16]",
        k: "f32[T, 2, 16]",
        v: "f32[T, 2, 16]",
        t: "f32[T, 16]",
        u: "f32[T, 16]",
    ) -> Any:
        return attend(rope(q, t), rope(k, u), v)

    fused(f, 0, "queries and keys are rotated by different tables")


def test_keys_that_are_used_again_are_refused() -> None:
    def f(q: "f32[T, 2, 16]", k: "f32[T, 2, 16]", v: "f32[T, 2, 16]", t: "f32[T, 16]") -> Any:
        k = rope(k, t)
        return attend(rope(q, t), k, v) + k

    fused(f, 0, "rope has another user")


@pytest.mark.parametrize("qk_norm", [False, True])
def test_one_hit_a_layer_region_and_the_caches_stay_right(qk_norm: bool) -> None:
    check_layers(fuse_qk_norm_rope_kv_write, qk_norm)
