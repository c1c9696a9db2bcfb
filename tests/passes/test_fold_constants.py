# ruff: noqa: F722, F821
"""fold_constants: arithmetic on weights moves to the loader, neutral arithmetic disappears."""

import torch

from aios_compile.passes.fold_constants import fold_constants
from tests.passes.helpers import apply, captured, check, evaluate, targets, trace


def test_arithmetic_on_weights_becomes_a_recipe():
    def f(x: "f32[T, 64]", w: "weight f32[64]", v: "weight f32[64]"):
        return x * (1 + w.exp() * v), x + w

    module = check(fold_constants, f, 1)
    assert targets(module) == ["mul", "add"]
    assert sum(not r.is_identity() for r in module.weights.values()) == 1
    assert "exp" in next(r.text() for r in module.weights.values() if not r.is_identity())


def test_a_constant_sequence_joins_the_weights_that_it_meets():
    def f(p: "input i64[T]", theta: "weight f32[]"):
        return p[:, None] * (1.0 / theta ** (torch.arange(0, 8, 2) / 8))

    module = trace(f)
    module.tensors["theta"] = torch.tensor(100.0)
    check(fold_constants, module, None)
    assert "pow" not in targets(module)


def test_neutral_arithmetic_disappears():
    def f(x: "f32[T, 64]"):
        y = (x * 1.0 + 0) / 1
        return (y - 0).to(torch.float32).clone().detach() ** 1 + 2

    module = check(fold_constants, f, None)
    assert targets(module) == ["add"]


def test_a_known_scalar_becomes_a_literal():
    def f(x: "f32[T, 64]", scale: "weight f32[]"):
        return x * scale

    module = check(fold_constants, f, 1)
    (node,) = (n for n in module.root.graph.nodes if n.op == "call_function")
    assert isinstance(node.args[1], float) and not module.weights


def test_near_miss_moving_or_casting_a_weight_is_left_to_its_user():
    def f(x: "f32[T, 64]", w: "weight bf16[32, 64]"):
        return x @ w.float().t()

    check(fold_constants, f, 0)


def test_near_miss_a_copy_that_changes_strides_stays():
    def f(x: "f32[T, 64]"):
        return x.t().contiguous()

    check(fold_constants, f, 0)


def test_near_miss_a_product_with_one_that_promotes_stays():
    def f(p: "input i64[T]"):
        return p * 1.0

    check(fold_constants, f, 0)


def test_near_miss_broadcast_by_adding_zeros_stays():
    def f(x: "f32[64]", z: "f32[T, 64]"):
        return x + z * 0

    check(fold_constants, f, 0)


def test_captured_layers_fold_each_call_of_the_region():
    module = captured("llama")
    assert apply(fold_constants, module).total > 0  # the rotary attention factor of 1

    module = trace_region()
    before = evaluate(module)
    assert apply(fold_constants, module).hits["layer"] == 4
    assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
    folded = [r for r in module.weights.values() if not r.is_identity()]
    assert len(folded) == 9 and len({r.names for r in folded}) == 9  # and the last norm


def trace_region():
    import transformers

    from tests.passes.helpers import captured_module

    config = transformers.Gemma2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"] * 2,
    )
    return captured_module(transformers.Gemma2ForCausalLM(config))


def test_runs_on_a_plain_function_without_weights():
    def f(x: "f32[T]"):
        return x.exp()

    assert apply(fold_constants, trace(f)).total == 0
