"""round_activations: fires where the processor has bf16 products, refusals, what stays."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import torch

from aios_compile.ir.module import IRModule
from aios_compile.passes.context import PassContext, PassOptions
from aios_compile.passes.result import PassResult
from aios_compile.passes.round_activations import round_activations
from aios_compile.passes.runner import Stage, run_pipeline
from tests.passes import helpers

aios = torch.ops.aios


def several(
    x: "f32[T, 64]",
    wide: "weight bf16[96, 64]",
    few: "weight bf16[8, 64]",
    single: "weight f32[96, 64]",
    made: "weight bf16[96, 64]",
    b: "weight f32[96]",
) -> Any:
    return (aios.linear(x, wide, b), aios.linear(x, few), aios.linear(x, single),
            aios.linear(x, made * 2.0))  # fmt: skip


def run(module: IRModule, bf16_dot: bool, target: str = "cpp") -> PassResult:
    options = PassOptions(target, bf16_dot=bf16_dot)
    results = run_pipeline(module, [Stage(module.level, (round_activations,))], options)
    return results[0] if results else PassResult("none", "exact", False)


def traced() -> IRModule:
    module = helpers.trace(several)
    for node in module.root.graph.nodes:
        node.meta["source_lines"] = (f"model.py: {node.name}",)
    return module


def test_only_loaded_bf16_matrices_of_many_rows() -> None:
    module = traced()
    result = run(module, True)
    assert result.hits == 1 and result.kept and result.max_error is not None
    assert result.max_error < 1e-5  # exact activations: what is proven is the rewrite
    text = " ".join(result.refusals)
    assert "a matrix of 8 rows keeps float32" in text and "computed in the graph" in text
    names = helpers.targets(module)
    assert names.count("aios.bf16_linear") == 1 and names.count("aios.linear") == 3


def test_not_without_the_instructions_and_not_for_a_gpu() -> None:
    module = traced()
    assert run(module, False).hits == 0
    assert run(module, True, "triton").hits == 0
    assert "aios.bf16_linear" not in helpers.targets(module)


def test_the_reference_rounds_to_nearest_even_and_float64_stays_exact() -> None:
    x = torch.tensor([[1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 2.0**-130]])
    w = torch.eye(3).bfloat16()
    got = aios.bf16_linear(x, w)
    assert torch.equal(got, torch.tensor([[1.0, 1.0 + 2.0**-6, 2.0**-130]]))
    assert torch.equal(aios.bf16_linear(x.double(), w.double()), x.double())
    assert aios.bf16_linear(x, w, torch.ones(3))[0, 0] == 2.0


def attentions(
    q: "f32[T, 4, 32]",
    starts: "input i64[3]",
    lengths: "input i64[2]",
    tables: "input i64[2, 8]",
    k: "input bf16[64, 2, 32, 16]",
    v: "input bf16[64, 2, 16, 32]",
    narrow: "input bf16[64, 2, 16, 24]",
    single: "input f32[64, 2, 32, 16]",
    values: "input f32[64, 2, 16, 32]",
) -> Any:
    rest = (starts, lengths, tables, 0.25)
    caches = ((k, v), (k, narrow), (single, values))
    return (
        *(aios.paged_attention(q, *pair, *rest) for pair in caches),
        k,
        v,
        narrow,
        single,
        values,
    )


def test_attention_over_bf16_is_marked_where_heads_fill_vectors() -> None:
    module = helpers.trace(attentions)
    context = PassContext(module, options=PassOptions("cpp", bf16_dot=True))
    assert round_activations(module.root.graph, context) == 1
    assert ["attention with heads of 32 and 24" in r.reason for r in context.refusals] == [True]
    found = module.root.graph.find_nodes(op="call_function", target=aios.paged_attention.default)
    assert [node.kwargs.get("rounded", False) for node in found] == [True, False, False]
