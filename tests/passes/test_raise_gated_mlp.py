# ruff: noqa: F821
"""raise_gated_mlp: an activation times a value becomes one op."""

import pytest
import torch
import torch.nn.functional as F

from aios_compile.passes.raise_gated_mlp import raise_gated_mlp
from tests.passes.helpers import apply, captured, check, evaluate, targets

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_in_both_orders(name):
    activation = ACTIVATIONS[name]

    def f(g: "f32[T, 64]", u: "f32[T, 64]"):
        return activation(g) * u, u * activation(g)

    module = check(raise_gated_mlp, f, 2)
    nodes = [n for n in module.root.graph.nodes if n.op == "call_function"]
    assert [n.args[2] for n in nodes] == [name, name]


def test_silu_spelled_out():
    def f(g: "f32[T, 64]", u: "f32[T, 64]"):
        return g * torch.sigmoid(g) * u

    module = check(raise_gated_mlp, f, 1)
    assert targets(module) == ["aios.gated_activation"]


def test_near_miss_silu_alone():
    def f(g: "f32[T, 64]"):
        return g * torch.sigmoid(g)

    check(raise_gated_mlp, f, 0)


def test_near_miss_square_of_an_activation():
    def f(g: "f32[T, 64]"):
        return F.relu(g) * F.relu(g), torch.ops.aten.mul.Tensor(*(F.relu(g),) * 2)

    check(raise_gated_mlp, f, 1, reason="with itself")


def test_near_miss_activation_used_elsewhere():
    def f(g: "f32[T, 64]", u: "f32[T, 64]"):
        y = F.silu(g)
        return y * u, y

    check(raise_gated_mlp, f, 0, reason="used elsewhere")


def test_near_miss_broadcast_gate():
    def f(g: "f32[T, 1]", u: "f32[T, 64]"):
        return torch.sigmoid(g) * u

    check(raise_gated_mlp, f, 0, reason="broadcast")


def test_near_miss_different_dtypes():
    def f(g: "f32[T, 64]", u: "bf16[T, 64]"):
        return torch.sigmoid(g) * u

    check(raise_gated_mlp, f, 0, reason="dtypes")


def test_near_miss_a_number():
    def f(g: "f32[T, 64]"):
        return F.silu(g) * 2

    check(raise_gated_mlp, f, 0)


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
def test_captured_layer_has_one(name):
    module = captured("llama", hidden_act=name)
    before = evaluate(module)
    assert apply(raise_gated_mlp, module).hits == {"layer": 1, "": 0}
    assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
    assert apply(raise_gated_mlp, module).total == 0
