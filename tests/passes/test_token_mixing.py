# ruff: noqa: F722, F821
"""mixing_nodes: what mixes tokens outside attention is found, what does not is left alone."""

import pytest
import torch
import torch.nn.functional as F

from aios_compile.passes.eliminate_views import eliminate_views
from aios_compile.passes.raise_attention import raise_attention
from aios_compile.passes.raise_linear import raise_linear
from aios_compile.passes.token_mixing import mixing_nodes
from tests.passes.helpers import apply, captured, trace

MIXING = {
    "mean": lambda x, w: x - x.mean(0, keepdim=True),
    "sum of all": lambda x, w: x * x.sum(),
    "cumulative sum": lambda x, w: x.cumsum(0),
    "softmax": lambda x, w: x.softmax(0),
    "product of tokens": lambda x, w: (x @ x.t()) @ x,
    "shift": lambda x, w: torch.cat((x[:1] * 0, x[:-1])),
    "last token": lambda x, w: x[-1:],
    "first token": lambda x, w: x * x[0],
    "repeat": lambda x, w: x.repeat(2, 1),
    "flip": lambda x, w: x.flip(0),
    "convolution": lambda x, w: F.conv1d(x.t()[None], w[:, :, None], padding=0),
    "differences": lambda x, w: (x[:, None, 0] - x[None, :, 0]).exp(),
    "sort": lambda x, w: x.sort(0).values,
    "transposed and reshaped": lambda x, w: x.t().reshape(-1, 64),
    "heads and tokens in one dimension": lambda x, w: (
        x.view(-1, 4, 16).transpose(0, 1).reshape(-1, 16)
    ),
    "scatter over tokens": lambda x, w: torch.zeros_like(x).scatter(0, x[:, :1].long(), 1.0),
    "scatter of tokens in features": lambda x, w: torch.zeros_like(w).scatter(1, x.long(), 1.0),
    "matrices of other tokens": lambda x, w: torch.bmm(x.t()[:, None], x.t()[:, :, None]),
}
SEPARATE = {
    "linear": lambda x, w: F.linear(x, w),
    "norms": lambda x, w: F.layer_norm(x, (64,)) + F.rms_norm(x, (64,)),
    "softmax over features": lambda x, w: x.softmax(-1) * x.mean(-1, keepdim=True),
    "layout": lambda x, w: (
        x.reshape(-1, 4, 16).transpose(0, 1)[:, :, :8].transpose(0, 1).flatten(1)
    ),
    "joined features": lambda x, w: torch.cat((x, x * 2), -1)[:, 3],
    "repeated features": lambda x, w: x.repeat(1, 3)[:, 5:],
    "chosen features": lambda x, w: x[:, [3, 1]] + x.index_select(1, torch.tensor([0, 2])),
    "a matrix for each token": lambda x, w: torch.bmm(
        w.view(4, 16, 64)[x[:, 0].long()], x[:, :, None]
    ),
    "a matrix for each of two choices": lambda x, w: torch.bmm(
        w.view(4, 16, 64)[x[:, :2].long().view(-1)],
        x[:, None].expand(-1, 2, -1).reshape(-1, 64, 1),
    ).view(-1, 2, 16),
    "chosen groups": lambda x, w: torch.zeros_like(x).scatter(1, x[:, :2].long(), 1.0),
    "top features": lambda x, w: x.topk(2).values + x.cumsum(1)[:, :2],
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing(name):
    def f(x: "f32[T, 64]", w: "weight f32[64, 64]"):
        return MIXING[name](x, w)

    assert mixing_nodes(trace(f))


@pytest.mark.parametrize("name", SEPARATE)
def test_separate(name):
    def f(x: "f32[T, 64]", w: "weight f32[64, 64]"):
        return SEPARATE[name](x, w)

    assert mixing_nodes(trace(f)) == []


def test_padded_features_are_separate_and_padded_tokens_are_not():
    """Put in by hand: traced outside of a model, torch fixes T for a padding."""

    def f(x: "f32[T, 64]"):
        return x * 2

    for widths, mixes in (([1, 2], False), ([0, 0, 1, 0], True)):
        module = trace(f)
        graph, double = module.root.graph, module.root.graph.find_nodes(
            op="call_function", target=torch.ops.aten.mul.Tensor
        )[0]  # fmt: skip
        with graph.inserting_after(double):
            pad = graph.call_function(torch.ops.aten.constant_pad_nd.default, (double, widths, 0.0))
        value, (features, tokens) = double.meta["val"], (sum(widths[:2]), sum(widths[2:]))
        shape = (value.shape[0] + tokens, value.shape[1] + features)
        pad.meta = {**double.meta, "val": value.new_empty(shape)}
        double.replace_all_uses_with(pad, delete_user_cb=lambda user, pad=pad: user is not pad)
        assert bool(mixing_nodes(module)) == mixes


def test_captured_decoder_mixes_only_in_attention():
    module = captured("qwen3")
    assert [str(n.target) for n in mixing_nodes(module)] == ["aios.sdpa.default"]
    for function in (raise_linear, raise_attention, eliminate_views):
        apply(function, module)
    assert mixing_nodes(module) == []
