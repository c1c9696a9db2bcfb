# ruff: noqa: F821
"""eliminate_common_subexpressions: each value once, each region input once."""

import torch

from aios_compile.passes.eliminate_common_subexpressions import (
    eliminate_common_subexpressions as cse,
)
from tests.passes.helpers import apply, captured, check, evaluate, targets


def test_merges_equal_values_and_the_values_that_follow():
    def f(x: "f32[T, 64]", c: "f32[T, 64]"):
        return (x * c.unsqueeze(0)).exp() + (c.unsqueeze(0) * x).exp()

    module = check(cse, f, 3)
    assert targets(module) == ["unsqueeze", "mul", "exp", "add"]


def test_near_miss_other_arguments():
    def f(x: "f32[T, 64]"):
        return x.unsqueeze(0), x.unsqueeze(1), x + 1, x + 1.0, x.sum(1), x.sum(1, keepdim=True)

    module = check(cse, f, 0)
    assert len(targets(module)) == 6


def test_near_miss_a_difference_does_not_commute():
    def f(x: "f32[T, 64]", y: "f32[T, 64]"):
        return x - y, y - x

    check(cse, f, 0)


def test_near_miss_random_numbers():
    def f(x: "f32[T, 64]"):
        return x + torch.ops.aten.rand_like(x), x + torch.ops.aten.rand_like(x)

    from tests.passes.helpers import trace

    assert apply(cse, trace(f)).total == 0


def test_captured_layer_unsqueezes_the_tables_once():
    module = captured("llama")
    before = evaluate(module)
    assert apply(cse, module).hits == {"layer": 2, "": 0}
    assert torch.equal(before[0], evaluate(module)[0])


def test_region_inputs_bound_to_one_value_are_merged():
    module = captured("llama")
    region = module.regions()["layer"]
    cos = next(
        i for i, n in enumerate(region.graph.find_nodes(op="placeholder")) if "cos" in n.name
    )
    sin = next(
        i for i, n in enumerate(region.graph.find_nodes(op="placeholder")) if "sin" in n.name
    )
    for call in module.calls("layer"):
        call.update_arg(sin, call.args[cos])
    before = evaluate(module)
    count = len(region.graph.find_nodes(op="placeholder"))
    hits = apply(cse, module).hits["layer"]
    assert len(region.graph.find_nodes(op="placeholder")) == count - 1
    assert torch.equal(before[0], evaluate(module)[0])
    assert hits == 4, "the input, three unsqueezes of it"
