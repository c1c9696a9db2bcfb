# ruff: noqa: F722, F821
"""raise_layer_norm: the native op and every spelled-out form become one op."""

import torch
import torch.nn.functional as F

from aios_compile.passes.raise_layer_norm import raise_layer_norm
from tests.passes.helpers import apply, check, evaluate, hugging_face, targets


def test_native_with_and_without_weights():
    def f(x: "f32[1, T, 64]", w: "weight f32[64]", b: "weight f32[64]"):
        return F.layer_norm(x, (64,), w, b), F.layer_norm(x, (64,), w), F.layer_norm(x, (64,))

    assert targets(check(raise_layer_norm, f, 3)) == ["aios.layer_norm"] * 3


def test_spelled_out():
    def f(x: "f32[T, 64]", w: "weight f32[64]", b: "weight f32[64]"):
        c = x - x.mean(-1, keepdim=True)
        y = w * (c / (c.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()) + b
        v = x.var(-1, keepdim=True, unbiased=False)
        z = (x - x.mean(-1, keepdim=True)) * (v + 1e-5).rsqrt() * w
        return y, z

    assert targets(check(raise_layer_norm, f, 2)) == ["aios.layer_norm"] * 2


def test_var_mean():
    def f(x: "f32[T, 64]", b: "weight f32[64]"):
        variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) * (variance + 1e-5).rsqrt() + b

    check(raise_layer_norm, f, 1)


def test_near_miss_unbiased_variance():
    def f(x: "f32[T, 64]"):
        v = x.var(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) * (v + 1e-5).rsqrt()

    check(raise_layer_norm, f, 0, reason="unbiased")


def test_near_miss_several_dimensions():
    def f(x: "f32[T, 4, 16]"):
        return F.layer_norm(x, (4, 16))

    check(raise_layer_norm, f, 0, reason="several dimensions")


def test_near_miss_statistics_are_used():
    def f(x: "f32[T, 64]"):
        return torch.ops.aten.native_layer_norm.default(x, [64], None, None, 1e-5)[:2]

    check(raise_layer_norm, f, 0, reason="statistics")


def test_near_miss_not_centred():
    def f(x: "f32[T, 64]"):
        c = x - x.mean(-1, keepdim=True)
        return x * (c.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()

    check(raise_layer_norm, f, 0)


def test_captured_gpt_neox_layer_has_two():
    module = hugging_face("GPTNeoX")
    before = evaluate(module)
    assert apply(raise_layer_norm, module).hits == {"layer": 2, "": 1}
    assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
    assert apply(raise_layer_norm, module).total == 0
