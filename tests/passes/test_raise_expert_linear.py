# ruff: noqa: F722, F821
"""raise_expert_linear: every spelling of a product with chosen matrices reads them in place."""

import torch

from aios_compile.passes.raise_expert_linear import raise_expert_linear
from aios_compile.passes.widen_activations import widen_activations
from tests.passes.helpers import apply, check, targets, trace

aios = torch.ops.aios


def ids(x, choices=1):
    """Return choices of 4 experts that depend on x, as a router's do."""
    return torch.topk(x[:, :4], choices).indices


def names(module):
    return [t for t in targets(module) if "linear" in t or "bmm" in t or "index" in t]


def test_a_matrix_for_each_row():
    def f(x: "f32[T, 48]", w: "weight f32[4, 80, 48]"):
        return torch.bmm(w[ids(x)[:, 0]], x[:, :, None]).squeeze(-1)

    assert names(check(raise_expert_linear, f, 1)) == ["aios.expert_linear"]


def test_rows_that_are_repeated_once_a_choice_are_read_where_they_are():
    def f(x: "f32[T, 48]", w: "weight f32[4, 80, 48]"):
        rows = x.repeat_interleave(2, 0)
        return torch.bmm(w[ids(x, 2).reshape(-1)], rows.unsqueeze(-1)).squeeze(-1).view(-1, 2, 80)

    module = check(raise_expert_linear, f, 1)
    assert names(module) == ["aios.expert_linear"]
    (node,) = module.root.graph.find_nodes(op="call_function", target=aios.expert_linear.default)
    sizes = [str(node.args[i].meta["val"].shape[0]) for i in (0, 2)]
    assert sizes[1] == f"2*{sizes[0]}"


def test_the_row_on_the_left_and_a_weight_stored_transposed():
    def f(x: "f32[T, 48]", w: "weight f32[4, 48, 80]", v: "weight f32[4, 80, 48]"):
        e = ids(x)[:, 0]
        return torch.bmm(x[:, None], w[e]), torch.bmm(x[:, None], v[e].transpose(1, 2))

    module = check(raise_expert_linear, f, 2)
    assert names(module) == ["aios.expert_linear"] * 2
    assert sum(not r.is_identity() for r in module.weights.values()) == 1


def test_a_gathered_bias_is_taken_in():
    def f(x: "f32[T, 48]", w: "weight f32[4, 80, 48]", b: "weight f32[4, 80]"):
        e = ids(x)[:, 0]
        return torch.bmm(w[e], x[:, :, None]).squeeze(-1) + b[e]

    assert names(check(raise_expert_linear, f, 2)) == ["aios.expert_linear"]


def test_a_half_precision_weight_is_read_as_it_is_stored():
    def f(x: "bf16[T, 48]", w: "weight bf16[4, 80, 48]", b: "weight bf16[4, 80]"):
        e = ids(x)[:, 0]
        return torch.bmm(w[e], x[:, :, None]).squeeze(-1) + b[e]

    module = trace(f)
    apply(widen_activations, module)
    module = check(raise_expert_linear, module, 2)
    assert names(module) == ["aios.expert_linear"]
    (node,) = module.root.graph.find_nodes(op="call_function", target=aios.expert_linear.default)
    assert {node.args[i].meta["val"].dtype for i in (1, 3)} == {torch.bfloat16}


def test_near_miss_another_bias():
    def f(x: "f32[T, 48]", w: "weight f32[4, 80, 48]", b: "weight f32[4, 80]"):
        e = ids(x, 2)
        return torch.bmm(w[e[:, 0]], x[:, :, None]).squeeze(-1) + b[e[:, 1]]

    assert names(check(raise_expert_linear, f, 1)) == ["aios.expert_linear", "index"]


def test_near_miss_a_bias_behind_a_view_of_more_dimensions():
    def f(x: "f32[T, 48]", w: "weight f32[4, 80, 48]", b: "weight f32[4, 80]"):
        e = ids(x)[:, 0]
        return torch.bmm(w[e], x[:, :, None]).squeeze(-1)[None] + b[e]

    assert names(check(raise_expert_linear, f, 1)) == ["aios.expert_linear", "index"]


def test_near_miss_several_rows_a_matrix():
    def f(x: "f32[T, 3, 48]", w: "weight f32[4, 48, 80]"):
        return torch.bmm(x, w[ids(x[:, 0])[:, 0]])

    check(raise_expert_linear, f, 0, reason="several rows")


def test_near_miss_a_matrix_that_is_computed():
    def f(x: "f32[T, 48]", w: "f32[4, 80, 48]"):
        return torch.bmm(w[ids(x)[:, 0]], x[:, :, None])

    check(raise_expert_linear, f, 0)
