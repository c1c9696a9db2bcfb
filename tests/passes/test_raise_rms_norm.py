# ruff: noqa: F722, F821
"""raise_rms_norm: every spelling of x / rms(x) * weight becomes one op."""

import torch
import torch.nn.functional as F

from aios_compile.passes.raise_rms_norm import raise_rms_norm
from aios_compile.passes.widen_activations import widen_activations
from tests.passes.helpers import apply, captured, check, evaluate, targets, trace


def scale(x, eps=1e-6):
    return x.pow(2).mean(-1, keepdim=True) + eps


def test_spellings_of_the_root():
    def f(x: "f32[T, 64]", w: "weight f32[64]"):
        return (
            w * (x * scale(x).rsqrt()),
            x * scale(x).sqrt().reciprocal() * w,
            w * (x / scale(x).sqrt()),
            x * scale(x).pow(-0.5) * w,
            x / scale(x) ** 0.5 * w,
        )

    assert targets(check(raise_rms_norm, f, 5)) == ["aios.rms_norm"] * 5


def test_spellings_of_the_mean_and_the_square():
    def f(x: "f32[T, 64]", w: "weight f32[64]"):
        total = (x * x).sum(-1, keepdim=True) / 64
        return x * (total + 1e-6).rsqrt() * w, F.rms_norm(x, (64,), w, 1e-6)

    assert targets(check(raise_rms_norm, f, 2)) == ["aios.rms_norm"] * 2


def test_without_a_weight_and_without_eps():
    def f(x: "f32[T, 4, 64]"):
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt()

    assert targets(check(raise_rms_norm, f, 1)) == ["aios.rms_norm"]


def test_the_cast_before_or_after_the_weight_is_kept_apart():
    def after(x: "bf16[T, 64]", w: "weight bf16[64]"):
        h = x.float()
        return w * (h * scale(h).rsqrt()).to(torch.bfloat16)

    def before(x: "bf16[T, 64]", w: "weight bf16[64]"):
        h = x.float()
        return (w.float() * (h * scale(h).rsqrt())).to(torch.bfloat16)

    for function, in_float32 in ((after, False), (before, True)):
        module = check(raise_rms_norm, function, 1)
        assert targets(module) == ["aios.rms_norm"]
        (node,) = (n for n in module.root.graph.nodes if n.op == "call_function")
        assert node.args[3] is in_float32 and node.meta["val"].dtype == torch.bfloat16


def test_a_result_that_stays_float32():
    def f(x: "bf16[T, 64]", w: "weight f32[64]"):
        h = x.float()
        return w * (h * scale(h).rsqrt())

    assert targets(check(raise_rms_norm, f, 1)) == ["_to_copy", "aios.rms_norm"]


def test_a_half_precision_weight_after_widening():
    def f(x: "bf16[T, 64]", w: "weight bf16[64]"):
        h = x.float()
        return w * (h * scale(h).rsqrt()).to(torch.bfloat16)

    module = trace(f)
    apply(widen_activations, module)
    assert targets(check(raise_rms_norm, module, 1)) == ["aios.rms_norm"]


def test_near_miss_another_value_is_divided():
    def f(x: "f32[T, 64]", y: "f32[T, 64]"):
        return y * scale(x).rsqrt()

    check(raise_rms_norm, f, 0, reason="another value")


def test_near_miss_layer_norm():
    def f(x: "f32[T, 64]"):
        c = x - x.mean(-1, keepdim=True)
        return c * scale(c).rsqrt()

    check(raise_rms_norm, f, 0)


def test_near_miss_mean_over_another_dimension():
    def f(x: "f32[4, T, 64]"):
        return x * (x.pow(2).mean(0, keepdim=True) + 1e-6).rsqrt()

    check(raise_rms_norm, f, 0)


def test_near_miss_a_sum_that_is_no_mean():
    def f(x: "f32[T, 64]"):
        return x * (x.pow(2).sum(-1, keepdim=True) + 1e-6).rsqrt()

    check(raise_rms_norm, f, 0)


def test_near_miss_another_power():
    def f(x: "f32[T, 64]"):
        return x * (x.pow(4).mean(-1, keepdim=True) + 1e-6).rsqrt()

    check(raise_rms_norm, f, 0)


def test_a_factor_that_is_no_weight_stays_outside():
    def f(x: "f32[T, 64]", g: "f32[T, 64]", w: "weight f32[1]"):
        return x * scale(x).rsqrt() * g, x * scale(x, 1e-5).rsqrt() * w

    assert targets(check(raise_rms_norm, f, 2)) == ["aios.rms_norm", "mul"] * 2


def test_a_norm_that_is_used_twice_keeps_its_weight_outside():
    def f(x: "f32[T, 64]", w: "weight f32[64]"):
        h = x * scale(x).rsqrt()
        return h, h * w

    assert targets(check(raise_rms_norm, f, 1)) == ["aios.rms_norm", "mul"]


def test_captured_layer_has_four_with_query_and_key_norms():
    module = captured("qwen3", torch.bfloat16)
    before = evaluate(module)
    apply(widen_activations, module)
    assert apply(raise_rms_norm, module).hits == {"layer": 4, "": 1}
    assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
    assert apply(raise_rms_norm, module).total == 0
    plain = captured("llama")
    assert apply(raise_rms_norm, plain).hits == {"layer": 2, "": 1}
