# ruff: noqa: F722, F821
"""widen_activations: half-precision activations become float32, weights stay as they are stored."""

import torch

from aios_compile.passes.match import aten
from aios_compile.passes.widen_activations import widen_activations
from tests.passes.helpers import apply, captured, check, evaluate, targets, trace


def norm(x: "bf16[T, 64]", w: "weight bf16[64]", p: "input i64[T]"):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(x.dtype) + p[:, None].to(x.dtype)


def dtypes(module, region=""):
    nodes = module.graphs()[region].graph.nodes
    values = [n.meta["val"] for n in nodes if n.op == "call_function"]
    return {v.dtype for v in values if isinstance(v, torch.Tensor)}


def test_fires_and_leaves_no_half_precision_value():
    module = check(widen_activations, norm, None)
    assert dtypes(module) == {torch.float32, torch.int64}
    assert module.root.graph.find_nodes(op="placeholder")[1].meta["val"].dtype == torch.bfloat16


def test_the_table_of_a_lookup_stays_half_precision():
    def f(table: "weight bf16[101, 64]", ids: "input i64[T]"):
        return torch.nn.functional.embedding(ids, table) * 2

    module = check(widen_activations, f, None)
    assert targets(module) == ["embedding", "_to_copy", "mul"]


def test_factories_and_integer_casts_become_float32():
    def f(x: "f16[T]", p: "input i64[T]"):
        return x + p.to(torch.float16) + torch.ones(1, dtype=torch.float16)

    module = check(widen_activations, f, None)
    assert torch.float16 not in dtypes(module)


def test_float32_model_is_left_alone():
    def f(x: "f32[T, 64]", w: "weight f32[64]"):
        return x.double().mul(w).float() * w

    check(widen_activations, f, 0)


def test_float64_stays():
    def f(x: "bf16[T, 64]"):
        return x.double() * 2

    module = check(widen_activations, f, 1)
    assert dtypes(module) == {torch.float64}


def test_captured_layer():
    module = captured(
        "qwen3", torch.bfloat16, sliding_window=16, use_sliding_window=True, max_window_layers=1
    )
    before = evaluate(module)
    hits = apply(widen_activations, module).hits
    assert all(hits.values()), hits
    for region in module.graphs():
        assert torch.bfloat16 not in dtypes(module, region) - (
            {torch.bfloat16} if not region else set()
        )
    lookups = module.root.graph.find_nodes(op="call_function", target=aten.embedding.default)
    half = [
        n
        for n in module.root.graph.nodes
        if n.op == "call_function" and getattr(n.meta["val"], "dtype", None) == torch.bfloat16
    ]
    assert half == lookups
    for call in module.calls("layer_0"):
        assert call.args[0].meta["val"].dtype == torch.float32
    assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
    assert apply(widen_activations, module).total == 0
    assert trace(norm).weights
