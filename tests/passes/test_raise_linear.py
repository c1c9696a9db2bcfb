# ruff: noqa: F722, F821
"""raise_linear: every spelling of a linear layer becomes aios.linear on the stored weight."""

import torch
import torch.nn.functional as F

from aios_compile.passes.raise_linear import raise_linear
from aios_compile.passes.widen_activations import widen_activations
from tests.passes.helpers import apply, captured, check, evaluate, hugging_face, targets, trace

aten = torch.ops.aten


def test_two_and_more_dimensions():
    def f(x: "f32[T, 64]", y: "f32[1, T, 64]", w: "weight f32[32, 64]", b: "weight f32[32]"):
        return F.linear(x, w), F.linear(x, w, b), F.linear(y, w, b), F.linear(y, w)

    assert targets(check(raise_linear, f, 4)) == ["aios.linear"] * 4


def test_matmul_and_a_bias_added_afterwards():
    def f(x: "f32[1, T, 64]", w: "weight f32[32, 64]", b: "weight f32[32]"):
        return b + x @ w.t()

    assert targets(check(raise_linear, f, 2)) == ["aios.linear"]


def test_batched_product_with_a_broadcast_weight():
    def f(x: "f32[2, T, 64]", w: "weight f32[32, 64]"):
        return torch.bmm(x, w.t()[None].expand(2, 64, 32))

    assert targets(check(raise_linear, f, 1)) == ["reshape", "aios.linear", "view"]


def test_a_weight_stored_transposed_is_turned_by_the_loader():
    def f(x: "f32[T, 64]", w: "weight f32[64, 32]", b: "weight f32[32]"):
        return torch.addmm(b, x, w), x @ w

    module = check(raise_linear, f, 2)
    assert targets(module) == ["aios.linear"] * 2
    assert sum(not r.is_identity() for r in module.weights.values()) == 1


def test_a_half_precision_weight_is_read_as_it_is_stored():
    def f(x: "bf16[T, 64]", w: "weight bf16[32, 64]", b: "weight bf16[32]"):
        return F.linear(x, w, b)

    module = trace(f)
    apply(widen_activations, module)
    assert targets(check(raise_linear, module, 1)) == ["aios.linear"]


def test_near_miss_two_activations():
    def f(x: "f32[T, 64]", y: "f32[64, 32]"):
        return x @ y

    check(raise_linear, f, 0)


def test_near_miss_addmm_with_a_residual():
    def f(r: "f32[T, 32]", x: "f32[T, 64]", w: "weight f32[32, 64]"):
        return aten.addmm.default(r, x, w.t())

    check(raise_linear, f, 0, reason="not a bias")


def test_near_miss_addmm_with_a_factor():
    def f(b: "weight f32[32]", x: "f32[T, 64]", w: "weight f32[32, 64]"):
        return aten.addmm.default(b, x, w.t(), beta=0.5)

    check(raise_linear, f, 0, reason="scales")


def test_near_miss_a_bias_of_another_width_stays_an_addition():
    def f(x: "f32[T, 64]", w: "weight f32[32, 64]", b: "weight f32[1]"):
        return x @ w.t() + b

    assert targets(check(raise_linear, f, 1)) == ["aios.linear", "add"]


def test_near_miss_a_product_that_is_used_twice_keeps_its_addition():
    def f(x: "f32[T, 64]", w: "weight f32[32, 64]", b: "weight f32[32]"):
        y = x @ w.t()
        return y, y + b

    assert targets(check(raise_linear, f, 1)) == ["aios.linear", "add"]


def test_captured_layer_has_seven_and_the_outer_graph_one():
    module = captured("qwen2")
    before = evaluate(module)
    assert apply(raise_linear, module).hits == {"layer": 7, "": 1}
    assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
    assert "mm" not in targets(module, "layer") and "permute" not in targets(module)
    assert apply(raise_linear, module).total == 0


def test_captured_gpt2():
    module = hugging_face("GPT2")
    before = evaluate(module)
    assert apply(raise_linear, module).hits == {"layer": 4, "": 1}
    assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)


def test_a_linear_of_heads_is_one_of_rows():
    """A linear of [T, H, K] was raised as it is, and no kernel reads two dimensions of rows."""

    def f(x: "f32[T, 4, 16]", w: "weight f32[24, 16]"):
        return F.linear(x, w)

    module = check(raise_linear, f)
    (linear,) = module.root.graph.find_nodes(
        op="call_function", target=torch.ops.aios.linear.default
    )
    assert linear.meta["val"].dim() == 2
