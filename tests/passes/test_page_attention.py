"""page_attention: fires, near misses, paged equals dense, a second run, captured layers."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import pytest
import torch

from aios_compile.ir.module import IRModule
from aios_compile.passes.gather_last_tokens import gather_last_tokens
from aios_compile.passes.page_attention import page_attention
from tests.passes import helpers, level2

aios = torch.ops.aios
FIRST, SECOND = list(range(1, 40)), list(range(7, 30))


def dense(ids: list[int], **model: Any) -> torch.Tensor:
    values = {"token_ids": torch.tensor(ids), "positions": torch.arange(len(ids))}
    return helpers.evaluate(level2.program(**model), values, len(ids))[0]


def paged(**model: Any) -> IRModule:
    module = level2.program(**model)
    assert helpers.apply(page_attention, module).hits == {"layer": 1, "": 0}
    return module


@pytest.mark.parametrize("window", [None, 5, 20])
def test_one_sequence_through_permuted_pages_equals_dense_attention(window: int | None) -> None:
    module = paged(window=window)
    caches = level2.empty_caches(module)
    want = dense(FIRST, window=window)
    pages = [9, 2, 5]
    parts = []
    for start, end in ((0, 17), (17, 18), (18, 38), (38, 39)):  # prefills and decodes, odd borders
        result = level2.step(module, [(FIRST[start:end], start, pages)], caches)
        parts.append(result["logits"])
    helpers.assert_same([want], [torch.cat(parts)])


def test_a_mixed_batch_gives_what_each_sequence_gives_alone() -> None:
    module = paged()
    caches = level2.empty_caches(module)
    level2.step(module, [(FIRST[:20], 0, [4, 1, 8])], caches)
    batch = [(SECOND, 0, [7, 3]), (FIRST[20:21], 20, [4, 1, 8])]
    logits = level2.step(module, batch, caches)["logits"]
    helpers.assert_same([dense(SECOND)], [logits[: len(SECOND)]])
    helpers.assert_same([dense(FIRST)[20:21]], [logits[len(SECOND) :]])


def test_padding_goes_to_the_trash_page() -> None:
    module = paged()
    caches = level2.empty_caches(module)
    level2.step(module, [(FIRST[:20], 0, [4, 1])], caches)
    before = {name: cache.clone() for name, cache in caches.items()}
    level2.step(module, [([0, 0, 0], 0, [0])], caches)
    for name, cache in caches.items():
        assert torch.equal(cache[1:], before[name][1:])


def test_caches_have_the_layout_and_dtype_of_the_options() -> None:
    module = paged(num_layers=2)
    nodes = {n.name: n.meta["val"] for n in module.root.graph.nodes if n.name in module.states}
    shapes = {tuple(v.shape) for v in nodes.values()}
    assert len(nodes) == 4
    assert shapes == {(64, 2, 8, 16), (64, 2, 16, 8)}
    assert {v.dtype for v in nodes.values()} == {torch.float32}
    inputs = {"token_ids", "positions", "slots", "query_starts", "context_lengths", "page_tables"}
    assert set(module.inputs.values()) == inputs


def test_a_second_run_finds_nothing() -> None:
    assert helpers.apply(page_attention, paged()).total == 0


def test_attention_over_a_batch_axis_is_refused() -> None:
    def f(q: "f32[2, T, 4, 16]", k: "f32[2, T, 2, 16]", v: "f32[2, T, 2, 16]") -> Any:
        return aios.attention(q, k, v, 0.25)

    applied = helpers.apply(page_attention, helpers.trace(f))
    assert applied.total == 0
    assert applied.refusals == ("attention over more than one sequence axis",)


def test_attention_to_other_keys_is_refused() -> None:
    def f(q: "f32[T, 4, 16]", k: "weight f32[9, 2, 16]", v: "weight f32[9, 2, 16]") -> Any:
        return aios.attention(q, k, v, 0.25)

    applied = helpers.apply(page_attention, helpers.trace(f))
    assert applied.total == 0
    assert applied.refusals == ("attention whose keys or queries are not this step's tokens",)


def test_paging_commutes_with_gathering() -> None:
    module = level2.program()
    helpers.apply(gather_last_tokens, module)
    assert helpers.apply(page_attention, module).total == 1
    logits = level2.step(module, [(FIRST, 0, [3, 1, 2])], level2.empty_caches(module))["logits"]
    helpers.assert_same([dense(FIRST)], [logits])
