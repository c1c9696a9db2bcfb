"""A program is windowed only if every layer is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import aios_compile.ir.ops  # noqa: F401  (registers the ops)
from aios_compile.ir.attention_window import window_tokens
from aios_compile.ir.module import IRModule, Level


def layer(**mask: Any) -> fx.GraphModule:
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    graph.output(graph.call_function(torch.ops.aios.attention.default, (q, k, v, 0.5), mask))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ([{"window": 7}], 7),
        ([{"window": 7}, {"window": 9}], 9),
        ([{"window": 7}, {"chunk": 32}], 32),
        ([{"window": 7}, {}], None),
        ([{}], None),
        ([], None),
    ],
    ids=str,
)
def test_the_widest_window_counts(masks: list[dict[str, int]], expected: int | None) -> None:
    root = torch.nn.Module()
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    for i, mask in enumerate(masks):
        root.add_module(f"layer{i}", layer(**mask))
        graph.call_module(f"layer{i}", (q, k, v))
    graph.output(q)
    module = IRModule(fx.GraphModule(root, graph), Level.SEMANTIC)
    assert window_tokens(module) == expected


def test_a_window_given_by_place_counts_too() -> None:
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    graph.output(graph.call_function(torch.ops.aios.attention.default, (q, k, v, 0.5, 11)))
    module = IRModule(fx.GraphModule(torch.nn.Module(), graph), Level.SEMANTIC)
    assert window_tokens(module) == 11
