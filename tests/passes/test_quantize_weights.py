"""quantize_weights: fires, refusals by reason, what is proven, planted mistakes that are caught."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule, placeholders
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantization_error import limit_of, measure, relative_error
from aios_compile.ir.quantized import dequantize
from aios_compile.passes.context import PassContext, PassOptions
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.merge_gate_up import merge_gate_up
from aios_compile.passes.merge_qkv import merge_qkv
from aios_compile.passes.quantize_weights import quantize_weights
from aios_compile.passes.result import PassResult
from aios_compile.passes.runner import Stage, run_pipeline
from tests.passes import helpers

aten, aios = torch.ops.aten, torch.ops.aios
INT8 = "int8_g32_f16"
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 128}


def run(module: IRModule, *passes: Any, form: str = INT8) -> dict[str, PassResult]:
    options = PassOptions(quantization=form)
    return {r.name: r for r in run_pipeline(module, [Stage(module.level, passes)], options)}


def traced(function: Any) -> IRModule:
    module = helpers.trace(function)
    for node in module.root.graph.nodes:
        node.meta["source_lines"] = (f"model.py: {node.name}",)
    return module


def two(
    x: "f32[T, 64]", w: "weight f32[96, 64]", v: "weight bf16[64, 96]", b: "weight f32[64]"
) -> Any:
    return aios.linear(torch.relu(aios.linear(x, w)), v, b)


def test_off_by_default() -> None:
    module = traced(two)
    assert helpers.apply(quantize_weights, module).total == 0


@pytest.mark.parametrize("form", [INT8, "int4_g32_f16", "uint4_g32_bf16_min_bf16"])
def test_weights_become_rows_of_the_format(form: str) -> None:
    module = traced(two)
    sources = dict(module.tensors)
    result = run(module, quantize_weights, form=form)["quantize_weights"]
    assert (result.hits, result.kept, result.refusals) == (2, True, ()), result
    assert helpers.targets(module) == ["aios.quantized_linear", "relu", "aios.quantized_linear"]
    assert result.max_error is not None and result.max_error < 1e-5
    values = {n.name: n.meta["val"] for n in placeholders(module.root.graph)}
    for name, width in (("w", 64), ("v", 96)):
        new = f"{name}_{form}"
        assert name not in values and values[new].dtype == torch.uint8
        rows = module.weights[new].run(sources)
        parsed = QuantFormat.parse(form)
        assert rows.shape == values[new].shape == (len(sources[name]), parsed.row_bytes(width))
        lost = dequantize(rows, parsed) - sources[name].float()
        assert lost.norm() / sources[name].float().norm() < (0.01 if form == INT8 else 0.1)
    assert run(module, quantize_weights, form=form)["quantize_weights"].hits == 0


def test_refusals() -> None:
    def f(
        x: "f32[T, 80]",
        y: "f32[T, 64]",
        odd: "weight f32[64, 80]",
        few: "weight f32[8, 64]",
        made: "weight f32[64, 64]",
        fits: "weight f32[64, 64]",
        experts: "weight f32[2, 40, 64]",
    ) -> Any:
        chosen = (y[:, 0] > 0).long()
        return (aios.linear(x, odd), aios.linear(y, few), aios.linear(y, made * 2.0),
                aios.linear(y, fits), aios.expert_linear(y, experts, chosen))  # fmt: skip

    result = run(traced(f), quantize_weights)["quantize_weights"]
    assert result.hits == 1 and result.kept
    text = " ".join(result.refusals)
    for reason in ("rows of 80 values, no multiple of the 32", "a matrix of 8 rows", "computed",
                   "experts of 40 rows, no multiple of 16"):  # fmt: skip
        assert reason in text


def mixture(
    x: "f32[T, 64]", up: "weight bf16[4, 32, 64]", down: "weight bf16[4, 64, 32]",
    bias: "weight bf16[4, 32]",
) -> Any:  # fmt: skip
    chosen = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return aios.expert_linear(aios.expert_linear(x, up, chosen, bias), down, chosen)


def test_experts_are_quantised_by_themselves() -> None:
    module = traced(mixture)
    result = run(module, quantize_weights)["quantize_weights"]
    assert result.hits == 2 and result.kept and result.max_error is not None, result.reason
    assert "aios.expert_linear" not in helpers.targets(module)
    names = [n for n in module.weights if n.endswith(INT8)]
    assert [module.weights[n].names for n in names] == [("up",), ("down",)]
    w = torch.randn(4, 32, 64)
    rows = module.weights[names[0]].run({"up": w.bfloat16()})
    assert rows.shape == (4, 32, QuantFormat.parse(INT8).row_bytes(64))
    for matrix, own in zip(w.bfloat16(), rows):
        assert torch.equal(own, aios.quantize_rows(matrix, INT8))
    values = dequantize(rows, QuantFormat.parse(INT8))
    assert (values - w).norm() < 0.01 * w.norm()


def test_experts_stay_where_no_kernel_reads_them() -> None:
    module = traced(mixture)
    options = PassOptions(quantization=INT8, target="triton")
    (result,) = run_pipeline(module, [Stage(module.level, (quantize_weights,))], options)
    assert result.hits == 0 and "which no triton kernel reads as codes" in result.refusals[0]


def test_the_largest_group_that_cuts_the_rows() -> None:
    """Rows of 160 and 192 values are no multiple of 128: groups of 32 and of 64."""

    def f(
        x: "f32[T, 160]", y: "f32[T, 192]", a: "weight bf16[64, 160]", b: "weight bf16[64, 192]"
    ) -> Any:
        return aios.linear(x, a), aios.linear(y, b)

    module = traced(f)
    result = run(module, quantize_weights, form="int4_g128_f16")["quantize_weights"]
    assert result.hits == 2 and result.kept
    assert set(module.weights) == {"a_int4_g32_f16", "b_int4_g64_f16"}
    asked = QuantFormat.parse("int4_g128_f16")
    assert asked.fitting(256) is asked and asked.fitting(80) is None
    assert QuantFormat.parse("int6_g16_k").fitting(160) is None
    weights = {"layers.0.a": torch.randn(64, 160), "layers.0.e": torch.randn(3, 40, 96)}
    measured = measure(weights.items(), "int4_g128_f16")
    assert measured.errors.keys() == weights.keys() and not measured.kept


def test_a_tied_table_keeps_its_rows_for_the_embedding() -> None:
    module = helpers.captured("llama", torch.bfloat16, tie_word_embeddings=True, **WIDE)
    results = run(module, quantize_weights)
    assert results["quantize_weights"].hits == 0  # level 1 has no aios.linear
    module = level2_model(tie_word_embeddings=True)
    results = run(module, merge_qkv, merge_gate_up, quantize_weights)
    assert results["quantize_weights"].hits == 5, results["quantize_weights"]
    names = [r.names[0] for r in module.weights.values() if r.is_identity()]
    assert any("embed" in n for n in names), names


def level2_model(**changes: Any) -> IRModule:
    from aios_compile.passes.pipeline import RAISE

    module = helpers.captured("llama", torch.bfloat16, **{**WIDE, **changes})
    run_pipeline(module, [RAISE], PassOptions(), verify=0)
    return module


def test_a_tied_table_is_stored_once_by_choice() -> None:
    module = level2_model(tie_word_embeddings=True)
    options = PassOptions(quantization=INT8, quantize_embeddings=True)
    stage = Stage(module.level, (merge_qkv, merge_gate_up, quantize_weights))
    result = run_pipeline(module, [stage], options)[-1]
    assert result.hits == 6 and result.kept and result.max_error is not None, result
    tables = [r for r in module.weights.values() if any("embed" in n for n in r.names)]
    assert len(tables) == 1 and "quantize_rows" in tables[0].text()
    nodes = module.root.graph.find_nodes(
        op="call_function", target=aios.quantized_embedding.default
    )
    assert len(nodes) == 1 and nodes[0].meta["val"].dtype == torch.float32


def test_weights_that_lose_too_much_stay_with_the_reason() -> None:
    kept = (("model.layers.1.mlp.down_proj.weight", "model.layers.*.mlp.down_proj would lose 20%"),)
    module = level2_model()
    options = PassOptions(quantization=INT8, kept_weights=kept)
    stage = Stage(module.level, (merge_qkv, merge_gate_up, quantize_weights))
    result = run_pipeline(module, [stage], options, verify=0)[-1]
    assert result.hits == 4 and "would lose 20%" in result.refusals[0]
    texts = [r.text() for r in module.weights.values()]
    assert all("quantize" not in text for text in texts if "down_proj" in text)


@pytest.mark.parametrize("form", [INT8, "int4_g32_f16", "uint4_g64_f16_min_f16"])
def test_the_measure_is_the_error_of_a_layer_s_outputs(form: str) -> None:
    """Of independent inputs that are alike; the limit: what a bit less costs normal weights."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(32, 512, generator=generator)
    x = torch.randn(4096, 512, generator=generator)
    lost = dequantize(aios.quantize_rows(normal, form), QuantFormat.parse(form)) - normal
    outputs = float((x @ lost.T).norm() / (x @ normal.T).norm())
    assert relative_error(normal, form) == pytest.approx(outputs, rel=0.05)
    assert limit_of(form) == pytest.approx(2 * outputs, rel=0.1)
    named = {f"model.layers.{i}.mlp.up_proj.weight": normal * 10.0**i for i in range(3)}
    found = measure({**named, "norm": normal[0], "nan": normal * torch.nan}.items(), form)
    assert set(found.errors) == set(named) and not found.kept_weights()
    assert "none is kept" in found.remarks()[0]


def test_groups_that_one_value_rules_are_kept() -> None:
    """Whatever the layer: the layers of a place are one region. Another place is not touched."""
    generator = torch.Generator().manual_seed(4)
    normal = torch.randn(64, 512, generator=generator)
    ruled = normal.clone()
    ruled[:, ::32] *= 100
    weights = {f"model.layers.{i}.mlp.down_proj.weight": ruled for i in range(3)}
    weights["model.layers.3.mlp.down_proj.weight"] = normal
    weights["model.layers.3.mlp.up_proj.weight"] = normal
    found = measure(weights.items(), INT8)
    assert set(found.kept) == {"model.layers.*.mlp.down_proj.weight"}
    assert {name for name, _ in found.kept_weights()} == set(list(weights)[:4])
    assert "one bit fewer" in found.kept_weights()[3][1] and "down_proj" in found.remarks()[0]


@graph_pass(numerics="lossy")
def wrong_rows(graph: fx.Graph, context: PassContext) -> int:
    """Quantise, and bind the first two calls of a region to each other's weights."""
    hits = quantize_weights(graph, context)
    if hits and context.region:
        first, second = context.module.calls(context.region)[:2]
        index = next(i for i, a in enumerate(first.args) if INT8 in str(a))
        left, right = list(first.args), list(second.args)
        left[index], right[index] = right[index], left[index]
        first.args, second.args = tuple(left), tuple(right)
    return hits


@graph_pass(numerics="lossy")
def lost_residual(graph: fx.Graph, context: PassContext) -> int:
    """Quantise, and scale one product by a hundredth too much."""
    hits = quantize_weights(graph, context)
    for node in graph.find_nodes(op="call_function", target=aios.quantized_linear.default)[:1]:
        with graph.inserting_after(node):
            scaled = context.call(graph, aten.mul.Tensor, node, 1.01, source=[node])
        node.replace_all_uses_with(scaled, lambda user, own=scaled: user is not own)
    return hits


@graph_pass(numerics="lossy")
def wrong_recipe(graph: fx.Graph, context: PassContext) -> int:
    """Quantise half of the weight: the recipe makes other values than the graph had."""
    hits = 0
    for node in graph.find_nodes(op="call_function", target=aios.linear.default):
        if not context.is_weight(node.args[1]):
            continue

        def build(w: Any) -> Any:
            return aios.quantize_rows.default(torch.mul(w, 0.5), INT8)

        rows = context.add_weight(graph, "halved", [node.args[1]], build)
        with graph.inserting_before(node):
            target = aios.quantized_linear.default
            new = context.call(graph, target, node.args[0], rows, INT8, source=[node])
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        hits += 1
    return hits


@pytest.mark.parametrize("wrong", [wrong_rows, lost_residual, wrong_recipe])
def test_planted_mistakes_are_reverted_although_quantisation_is_lossy(wrong: Any) -> None:
    module = level2_model()
    before = snapshot.module_text(module)
    result = run(module, wrong)[wrong.__name__]
    assert result.hits and not result.kept and "exceeds the budget" in result.reason, result
    assert snapshot.module_text(module) == before
    assert run(module, quantize_weights)["quantize_weights"].kept
