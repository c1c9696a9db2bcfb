# ruff: noqa: F722, F821, UP037
"""What a decode step reads: rows of a table, chosen experts and a window, not all that is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule, body_of
from aios_compile.passes.context import PassOptions
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.runner import run_pipeline
from aios_compile.study.traffic import CallCost, Traffic, call_costs, main_reader
from tests.passes.helpers import trace
from tests.planted import programs


def rows_of_a_table(x: "f32[T, 64]", w: "weight f32[200, 64]") -> Any:
    return x + w[torch.topk(x[:, :4], 1).indices[:, 0]]


def columns_of_a_table(x: "f32[T, 64]", w: "weight f32[64, 200]") -> Any:
    return x + w[:, torch.topk(x[:, :4], 1).indices[:, 0]].transpose(0, 1)


def read_and_looked_up(x: "f32[T, 64]", w: "weight f32[64, 64]") -> Any:
    return torch.ops.aios.linear(x + w[torch.topk(x[:, :4], 1).indices[:, 0]], w, None)


def moved(module: IRModule, context: int = 256) -> Traffic:
    module = snapshot.take(module)
    run_pipeline(module, STAGES, PassOptions(), verify=0)
    return sum((c.traffic * c.times for c in call_costs(module, context)), Traffic())


@pytest.mark.parametrize(
    ("function", "weights"),
    [
        (rows_of_a_table, 64 * 4),
        (columns_of_a_table, 64 * 4),
        (read_and_looked_up, 64 * 64 * 4 + 64 * 4),
        (programs.experts, 80 * 48 * 4),
    ],
)
def test_weights_that_are_chosen_from_count_as_far_as_they_are_read(
    function: Callable[..., Any], weights: int
) -> None:
    module = trace(function)
    for node in module.root.graph.nodes:
        node.meta["source_lines"] = ("model.py:1 in forward: x",)
    assert moved(module).weights == weights


def test_attention_with_a_window_reads_no_more_of_the_cache() -> None:
    module = programs.level_1("window")
    narrow, wide = (moved(module, context).kv for context in (4, 300))
    written = moved(module, 0).kv
    assert (narrow - written) * 9 == (wide - written) * 4 > 0, "its window has nine tokens"


def test_the_line_of_a_fused_kernel_is_that_of_its_matrix_not_of_its_norm() -> None:
    module = snapshot.take(programs.level_1("triton"))
    run_pipeline(module, STAGES, programs.options_of("triton"), verify=0)
    ops = [main_reader(module, cost) for cost in call_costs(module) if _has_norm_and_linear(cost)]
    assert [node and node.target for node in ops] == [torch.ops.aios.linear.default] * 2


def _has_norm_and_linear(cost: CallCost) -> bool:
    targets = {n.target for n in body_of(cost.call).graph.nodes}
    return {torch.ops.aios.linear.default, torch.ops.aios.rms_norm.default} <= targets
