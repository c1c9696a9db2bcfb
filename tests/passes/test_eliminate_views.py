# ruff: noqa: F722, F821
"""eliminate_views: chains of views become the one or two that say the same."""

import torch

from aios_compile.passes.eliminate_common_subexpressions import eliminate_common_subexpressions
from aios_compile.passes.eliminate_views import eliminate_views
from aios_compile.passes.raise_attention import raise_attention
from aios_compile.passes.raise_linear import raise_linear
from aios_compile.passes.raise_rms_norm import raise_rms_norm
from aios_compile.passes.raise_rope import raise_rope
from tests.passes.helpers import apply, captured, check, evaluate, hugging_face, targets

LAYOUT = {"view", "permute", "clone", "unsqueeze", "squeeze", "select", "expand", "slice"}


def test_transposes_cancel_through_dims_of_size_one():
    def f(x: "f32[1, T, 4, 64]"):
        return x.permute(0, 2, 1, 3)[0].permute(1, 0, 2)

    assert targets(check(eliminate_views, f, None)) == ["view"]


def test_transposes_compose():
    def f(x: "f32[T, 4, 8]"):
        return x.permute(1, 0, 2).permute(0, 2, 1)[None]

    module = check(eliminate_views, f, None)
    assert targets(module) == ["permute", "unsqueeze"]


def test_transposes_sink_below_functions_of_one_value():
    def f(x: "f32[T, 4, 8]", w: "weight f32[8]"):
        y = (x.transpose(0, 1) * 2).exp()
        return torch.ops.aios.rms_norm.default(y, w, 1e-6, True).transpose(0, 1)

    assert "permute" not in targets(check(eliminate_views, f, None))


def test_transposes_sink_below_slices_and_splits():
    def f(x: "f32[1, T, 4, 12]"):
        q, k = x.transpose(1, 2).split((8, 4), -1)
        part = x.transpose(1, 2)[..., 2:5]
        return q.transpose(1, 2), k.transpose(1, 2), part.transpose(1, 2)

    module = check(eliminate_views, f, None)
    assert "permute" not in targets(module)


def test_copies_of_contiguous_values_and_views_that_change_nothing_disappear():
    def f(x: "f32[T, 4, 8]"):
        y = x.transpose(0, 1).transpose(0, 1).contiguous().clone()
        return y[:, :, :8].expand(-1, 4, 8).reshape(-1, 32).view(-1, 32) + 1

    assert targets(check(eliminate_views, f, None)) == ["view", "add"]


def test_sizes_are_written_as_minus_one():
    def f(x: "f32[1, T, 32]", y: "f32[1, T, 32]"):
        return x.view(1, y.shape[1], -1, 8).exp()

    assert "sym_size.int" not in " ".join(targets(check(eliminate_views, f, None)))


def test_near_miss_one_transpose_stays():
    def f(x: "f32[T, 4, 8]"):
        return x.transpose(0, 1), x.transpose(1, 2).contiguous()

    check(eliminate_views, f, 0)


def test_near_miss_a_reshape_between_transposes_stays():
    def f(x: "f32[T, 4, 8]"):
        return x.transpose(1, 2).reshape(-1, 32).t()

    assert targets(check(eliminate_views, f, 0)).count("permute") == 2


def test_near_miss_a_broadcast_and_a_real_slice_stay():
    def f(x: "f32[T, 1, 8]"):
        return x.expand(-1, 4, 8) + 1, x[..., :4] + 1

    check(eliminate_views, f, 0)


def test_near_miss_a_function_of_the_last_dim_keeps_its_transpose():
    def f(x: "f32[T, 4, 8]"):
        return torch.ops.aios.rms_norm.default(x.transpose(1, 2), None, 1e-6, True)

    check(eliminate_views, f, 0)


def test_near_miss_two_values_of_different_layout():
    def f(x: "f32[4, 4]", y: "f32[4, 4]"):
        return x.t() + y

    check(eliminate_views, f, 0)


def raised(module):
    for function in (
        eliminate_common_subexpressions,
        raise_linear,
        raise_rms_norm,
        raise_rope,
        raise_attention,
        eliminate_views,
        eliminate_common_subexpressions,
    ):
        apply(function, module)
    return module


def test_captured_layer_keeps_only_the_views_that_split_and_join_heads():
    for model_type in ("llama", "qwen3"):
        module = captured(model_type)
        before = evaluate(module)
        found = [t for t in targets(raised(module), "layer") if t in LAYOUT]
        assert found == ["view"] * 4
        assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
        assert apply(eliminate_views, module).total == 0


def test_captured_hugging_face_layer():
    module = hugging_face("Llama")
    before = evaluate(module)
    found = [t for t in targets(raised(module), "layer") if t in LAYOUT]
    assert set(found) == {"view"} and len(found) <= 7
    assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
    assert apply(eliminate_views, module).total == 0
