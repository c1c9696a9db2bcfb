"""keep_quantized_weights: fires on recipes over stored rows, merges by format, splits regions."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import torch

from aios_compile.ir.module import body_of
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantized import dequantize
from aios_compile.ir.stored_weights import bind_stored_weights, random_rows, stored_rows
from aios_compile.passes.keep_quantized_weights import keep_quantized_weights
from aios_compile.passes.merge_gate_up import merge_gate_up
from aios_compile.passes.merge_qkv import merge_qkv
from tests.passes import helpers

aios = torch.ops.aios
Q8, Q4 = "int8_g32_f16", "uint4_g32_f16_min_f16"


def heads(x: Any, w: Any) -> Any:
    return aios.linear(x, w, None).unflatten(-1, (-1, 16))


def attention(
    x: "f32[T, 64]",
    wq: "weight f32[64, 64]",
    wk: "weight f32[32, 64]",
    wv: "weight f32[32, 64]",
) -> Any:
    return aios.attention(heads(x, wq), heads(x, wk), heads(x, wv), 0.25)


def test_one_format_becomes_one_matrix_of_rows() -> None:
    module = helpers.trace(attention)
    bind_stored_weights(module, dict.fromkeys(("wq", "wk", "wv"), Q8))
    assert helpers.apply(keep_quantized_weights, module).total == 3
    assert helpers.apply(keep_quantized_weights, module).total == 0
    assert helpers.apply(merge_qkv, module).total == 1
    assert helpers.targets(module)[0] == "aios.quantized_linear"
    recipe = module.weights["qkv_proj_weight"]
    assert recipe.names == (f"wq:{Q8}", f"wk:{Q8}", f"wv:{Q8}")
    rows = {n: random_rows(n, (32, 68), 0) for n in recipe.names}
    assert torch.equal(recipe.run(rows), torch.cat(list(rows.values())))


def test_other_formats_stay_apart() -> None:
    module = helpers.trace(attention)
    bind_stored_weights(module, {"wq": Q8, "wk": Q8, "wv": Q4})
    assert helpers.apply(keep_quantized_weights, module).total == 3
    applied = helpers.apply(merge_qkv, module)
    assert applied.total == 0
    assert applied.refusals == (f"weights stored as {Q8} and {Q4}",)


ORDERED = {"wq": "wq", "wk": "wq", "wv": "wv"}  # q and k have one order, v its own


def test_columns_in_another_order() -> None:
    module = helpers.trace(attention)
    bind_stored_weights(module, dict.fromkeys(ORDERED, Q8), ORDERED)
    rows = {f"{n}:{Q8}": random_rows(f"{n}:{Q8}", (32, 68), 0) for n in ORDERED}
    orders = {f"{n}:order": random_rows(f"{n}:order", (64,), 0) for n in ("wq", "wv")}
    recipe = module.weights[next(n for n in module.weights if n.startswith("wk"))]
    values = dequantize(rows[f"wk:{Q8}"], QuantFormat.parse(Q8))
    assert torch.equal(recipe.run(rows | orders)[:, orders["wq:order"]], values)
    assert helpers.apply(keep_quantized_weights, module).total == 3
    nodes = list(module.root.graph.nodes)
    q, k, v = (n for n in nodes if n.target is aios.quantized_linear.default)
    assert q.args[4] is k.args[4] is not v.args[4]
    applied = helpers.apply(merge_qkv, module)
    assert applied.total == 0 and "in different orders" in applied.refusals[0]


def test_linears_of_one_order_are_merged() -> None:
    module = helpers.trace(attention)
    bind_stored_weights(module, dict.fromkeys(ORDERED, Q8), dict.fromkeys(ORDERED, "wq"))
    helpers.apply(keep_quantized_weights, module)
    assert helpers.apply(merge_qkv, module).total == 1
    (linear,) = (n for n in module.root.graph.nodes if n.target is aios.quantized_linear.default)
    assert module.weights[linear.args[4].name].names == ("wq:order",)
    bind_ordered = helpers.trace(attention)  # some matrices in order, some not, stay apart
    bind_stored_weights(bind_ordered, dict.fromkeys(ORDERED, Q8), {"wq": "wq"})
    helpers.apply(keep_quantized_weights, bind_ordered)
    assert helpers.apply(merge_qkv, bind_ordered).total == 0


def test_a_table_whose_columns_are_shuffled_stays() -> None:
    def f(ids: "i64[T]", w: "weight f32[128, 64]") -> Any:
        return torch.ops.aten.embedding(w, ids)

    module = helpers.trace(f)
    bind_stored_weights(module, {"w": Q8}, {"w": "w"})
    applied = helpers.apply(keep_quantized_weights, module)
    assert applied.total == 0 and "columns are shuffled" in applied.refusals[0]


def test_floats_stay_linears() -> None:
    module = helpers.trace(attention)
    bind_stored_weights(module, {"wk": Q8})
    assert helpers.apply(keep_quantized_weights, module).total == 1
    assert helpers.targets(module).count("aios.linear") == 2
    applied = helpers.apply(merge_qkv, module)
    assert applied.total == 0 and "floats" in applied.refusals[0]


def test_rows_that_activations_do_not_fit_are_refused() -> None:
    def f(x: "f32[T, 48]", w: "weight f32[64, 48]") -> Any:
        return aios.linear(x, w, None)

    module = helpers.trace(f)
    bind_stored_weights(module, {"w": "int8_g16_f16"})
    applied = helpers.apply(keep_quantized_weights, module)
    assert applied.total == 0
    assert applied.refusals == ("rows of 48 values, no multiple of 32",)


def test_an_embedding_and_its_tied_head_share_the_rows() -> None:
    def f(ids: "i64[T]", w: "weight bf16[128, 64]") -> Any:
        x = torch.ops.aten.embedding(w, ids)
        return aios.linear(x.float(), w, None), x

    module = helpers.trace(f)
    bind_stored_weights(module, {"w": Q8})
    assert helpers.apply(keep_quantized_weights, module).total == 2
    # who widens the row gets it as it is, who does not gets it rounded as before
    assert helpers.targets(module) == ["aios.quantized_embedding", "_to_copy",
                                       "aios.quantized_linear"]  # fmt: skip
    (name,) = module.weights
    assert module.weights[name].names == (f"w:{Q8}",)


def test_gate_and_up() -> None:
    def f(x: "f32[T, 64]", wg: "weight f32[96, 64]", wu: "weight f32[96, 64]") -> Any:
        return aios.gated_activation(aios.linear(x, wg), aios.linear(x, wu), "silu")

    module = helpers.trace(f)
    bind_stored_weights(module, {"wg": Q4, "wu": Q4})
    helpers.apply(keep_quantized_weights, module)
    assert helpers.apply(merge_gate_up, module).total == 1
    assert "aios.linear" not in helpers.targets(module)


def test_layers_of_other_formats_become_regions() -> None:
    """Four layers, the middle ones stored otherwise: two regions, each call bound as before."""
    module = helpers.captured(num_hidden_layers=4, hidden_size=64, intermediate_size=96)
    name = "model.layers.{}.mlp.down_proj.weight"
    calls = module.calls("layer")
    order = [str(call.args[-1]) for call in calls]
    bind_stored_weights(module, {name.format(i): Q8 if i in (0, 3) else Q4 for i in range(4)})
    assert list(module.regions()) == ["layer", "layer_1"]
    assert [str(call.target) for call in calls] == ["layer", "layer_1", "layer_1", "layer"]
    assert [str(call.args[-1]) for call in calls] == order
    assert body_of(calls[0]) is not body_of(calls[1])
    found = [stored_rows(recipe) for recipe in module.weights.values()]
    assert sorted(entry for entry in found if entry)[1] == (f"{name.format(1)}:{Q4}", Q4, "")
    module.root.graph.lint()


def test_random_rows_are_weights_of_a_sensible_size() -> None:
    names = (
        "int8_g32_f16", "int4_g128_bf16", "uint4_g32_f16_min_f16", "uint4_g32_k_min_k",
        "uint5_g32_k_min_k", "int6_g16_k", "uint4_g128_f16_min_zero", "int8_g64_f32",
    )  # fmt: skip
    for name in names:
        form = QuantFormat.parse(name)
        rows = random_rows(f"w:{name}", (70, form.row_bytes(512)), 0)
        values = dequantize(rows, form)
        assert values.shape == (70, 512) and 0.005 < values.std() < 1, (name, values.std())
        assert torch.equal(rows[:6], rows[64:])  # the pattern repeats
        assert not torch.equal(rows, random_rows(f"v:{name}", tuple(rows.shape), 0))
