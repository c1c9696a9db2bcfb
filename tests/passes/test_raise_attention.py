# ruff: noqa: F722, F821
"""raise_attention: called and spelled-out attention, every mask found by running it."""

import pytest
import torch
import torch.nn.functional as F

from aios_compile.passes.raise_attention import raise_attention
from tests.passes.helpers import apply, captured, check, evaluate, targets, trace

sdpa = torch.ops.aios.sdpa.default


def attention_of(module, region=""):
    (node,) = (n for n in module.graphs()[region].graph.nodes if "aios.attention" in str(n.target))
    scale, window, softcap, chunk, sinks, *alibi = node.args[3:]
    return scale, window, softcap, chunk, sinks, *alibi


def repeat(x, n):
    return (
        x[:, :, None].expand(1, x.shape[1], n, x.shape[2], x.shape[3]).reshape(1, -1, x.shape[2], 8)
    )


def causal(n):
    return torch.full((n, n), float("-inf")).triu(1)


def test_called_in_both_ranks():
    def f(q: "f32[4, T, 8]", k: "f32[2, T, 8]", v: "f32[2, T, 8]"):
        one = sdpa(q, k, v, None, True, None, True)
        return one, sdpa(q[None], k[None], v[None], None, True, 0.5, True)

    assert targets(check(raise_attention, f, 2)).count("aios.attention") == 2


def test_called_with_repeated_key_heads():
    def f(q: "f32[1, 4, T, 8]", k: "f32[1, 2, T, 8]", v: "f32[1, 2, T, 8]"):
        return sdpa(q, repeat(k, 2), v.repeat_interleave(2, 1), None, True, None, False)

    module = check(raise_attention, f, 1)
    node = next(n for n in module.root.graph.nodes if "aios.attention" in str(n.target))
    assert [a.meta["val"].shape[1] for a in node.args[:3]] == [4, 2, 2]
    assert not {"expand", "clone"} & set(targets(module))


def test_multi_query():
    def f(q: "f32[1, 4, T, 8]", k: "f32[1, 1, T, 8]", v: "f32[1, 1, T, 8]"):
        return sdpa(q, k.expand(1, 4, -1, 8), v.expand(1, 4, -1, 8), None, True, None, False)

    module = check(raise_attention, f, 1)
    node = next(n for n in module.root.graph.nodes if "aios.attention" in str(n.target))
    assert node.args[1].meta["val"].shape[1] == 1


def test_spelled_out_with_soft_cap_and_additive_mask():
    def f(q: "f32[1, 4, T, 8]", k: "f32[1, 2, T, 8]", v: "f32[1, 2, T, 8]"):
        s = 20 * torch.tanh(q @ repeat(k, 2).transpose(2, 3) * 0.3 / 20)
        s = s + torch.full((s.shape[-1],) * 2, torch.finfo(torch.float32).min).triu(1)
        w = F.dropout(F.softmax(s, -1, dtype=torch.float32).to(q.dtype), 0.1, False)
        return (w @ repeat(v, 2)).transpose(1, 2)

    module = check(raise_attention, f, 1)
    assert attention_of(module) == (pytest.approx(0.3), None, 20.0, None, None)
    assert not {"bmm", "_softmax", "where"} & set(targets(module))


def test_spelled_out_with_einsum_and_a_selected_mask():
    def f(q: "f32[T, 4, 8]", k: "f32[T, 2, 8]", v: "f32[T, 2, 8]"):
        s = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) / 8**0.5
        mask = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool).tril()
        w = s.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", w, v.repeat_interleave(2, 1))

    module = check(raise_attention, f, 1)
    assert attention_of(module)[0] == pytest.approx(8**-0.5)


def test_a_window_is_not_read_from_a_value_that_looks_like_a_table():
    """As many heads as features: [T, 4, 4] is no stored triangle of four tokens."""

    def f(x: "f32[T, 4, 4]", k: "f32[T, 4, 4]", v: "f32[T, 4, 4]"):
        i = torch.arange(x.shape[0])
        distance = i[:, None] - i[None]
        s = x.transpose(0, 1) @ k.permute(1, 2, 0)
        s = s.masked_fill((distance < 0) | (distance >= 9), float("-inf"))
        return s.softmax(-1) @ v.transpose(0, 1)

    assert attention_of(check(raise_attention, f, 1))[1] == 9


def test_spelled_out_with_sinks():
    def f(q: "f32[1, 4, T, 8]", k: "f32[1, 4, T, 8]", v: "f32[1, 4, T, 8]", b: "weight f32[4]"):
        s = q @ k.transpose(2, 3) + causal(q.shape[2])
        s = torch.cat((s, b.reshape(1, 4, 1, 1).expand(1, 4, q.shape[2], 1)), -1)
        s = s - s.amax(-1, keepdim=True)
        return s.softmax(-1)[..., :-1] @ v

    assert attention_of(check(raise_attention, f, 1))[4].name == "b"


def masked(mask_of, **changes):
    def f(
        q: "f32[4, T, 8]",
        k: "f32[4, T, 8]",
        v: "f32[4, T, 8]",
        positions: "input i64[T]",
        ids: "input i64[T]",
        table: "weight b8[64, 64]",
    ):
        mask = mask_of(positions[:, None], positions[None], ids, table, q.shape[1])
        return sdpa(q, k, v, mask, False, None, False)

    module = trace(f)
    module.tensors["table"] = torch.ones(64, 64, dtype=torch.bool).tril()
    return module


MASKS = {
    "causal": (lambda i, j, ids, table, n: j <= i, (None, None)),
    "window": (lambda i, j, ids, table, n: (j <= i) & (i - j < 5), (5, None)),
    "wide window": (lambda i, j, ids, table, n: (j <= i) & (j > i - 4096), (4096, None)),
    "chunk": (lambda i, j, ids, table, n: (j <= i) & (i // 6 == j // 6), (None, 6)),
    "added": (lambda i, j, ids, table, n: torch.where(j <= i, 0.0, float("-inf")), (None, None)),
    "triangle": (lambda i, j, ids, table, n: causal(n), (None, None)),
    "band": (
        lambda i, j, ids, table, n: torch.ones(n, n, dtype=torch.bool).tril().triu(-3),
        (4, None),
    ),
    "table": (lambda i, j, ids, table, n: table[:n, :n], (None, None)),
}
REFUSED = {
    "later": (lambda i, j, ids, table, n: i - j < 3, "see later ones"),
    "squared distance": (
        lambda i, j, ids, table, n: (j - i).square() * -0.5 + causal(n),
        "does not fall with the distance alone",
    ),
    "bias of the key": (
        lambda i, j, ids, table, n: torch.sin(j * 1.0) + causal(n),
        "does not fall with the distance alone",
    ),
    "heads": (
        lambda i, j, ids, table, n: (j <= i) & (i - j < torch.arange(2, 6)[:, None, None]),
        "differs between heads",
    ),
    "ids": (lambda i, j, ids, table, n: (j <= i) & (ids[:, None] == ids), "depends on ids"),
    "counted": (
        lambda i, j, ids, table, n: torch.ones(n, n, dtype=torch.bool).tril().triu(-131071),
        "too large to be run",
    ),
    "prefix": (lambda i, j, ids, table, n: (j <= i) & ((j < 2) | (i - j < 3)), "neither causal"),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask(name):
    mask_of, (window, chunk) = MASKS[name]
    assert attention_of(check(raise_attention, masked(mask_of), 1))[1:4] == (window, None, chunk)


def slopes():
    return torch.pow(2.0, torch.arange(1, 5) * -2.0)[:, None, None]


BIASES = {
    "distance": lambda i, j: (j - i) * slopes(),
    "of the key only": lambda i, j: j * slopes(),
    "from the end": lambda i, j: (j - j.max()) * slopes() - i * 0.25,
}


@pytest.mark.parametrize("name", BIASES)
def test_alibi(name):
    def mask(i, j, ids, table, n):
        return BIASES[name](i, j) + causal(n)

    found = attention_of(check(raise_attention, masked(mask), 1))
    assert found[1:4] == (None, None, None)
    torch.testing.assert_close(torch.tensor(found[5]), slopes()[:, 0, 0], rtol=1e-6, atol=0)


def test_alibi_within_a_window():
    def mask(i, j, ids, table, n):
        bias = (j - i) * slopes()
        return torch.where((j <= i) & (i - j < 5), bias, float("-inf"))

    found = attention_of(check(raise_attention, masked(mask), 1))
    assert found[1] == 5 and len(found[5]) == 4


@pytest.mark.parametrize("name", REFUSED)
def test_near_miss_mask(name):
    mask_of, reason = REFUSED[name]
    check(raise_attention, masked(mask_of), 0, reason=reason)


def test_near_miss_bidirectional():
    def f(q: "f32[4, T, 8]", k: "f32[4, T, 8]", v: "f32[4, T, 8]"):
        return sdpa(q, k, v, None, False, None, False), (q @ k.transpose(1, 2)).softmax(-1) @ v

    check(raise_attention, f, 0, reason="without a mask")


def test_near_miss_softmax_over_queries():
    def f(q: "f32[4, T, 8]", k: "f32[4, T, 8]", v: "f32[4, T, 8]"):
        return (q @ k.transpose(1, 2) + causal(q.shape[1])).softmax(-2) @ v

    check(raise_attention, f, 0, reason="not over the keys")


def test_near_miss_transposed_weights():
    def f(q: "f32[4, T, 8]", k: "f32[4, T, 8]", v: "f32[4, T, 8]"):
        return (q @ k.transpose(1, 2) + causal(q.shape[1])).softmax(-1).transpose(1, 2) @ v

    check(raise_attention, f, 0, reason="rearranged")


def test_near_miss_another_function_of_the_scores():
    def f(q: "f32[4, T, 8]", k: "f32[4, T, 8]", v: "f32[4, T, 8]"):
        return ((q @ k.transpose(1, 2)).exp() + causal(q.shape[1])).softmax(-1) @ v

    check(raise_attention, f, 0, reason="scores go through")


def test_near_miss_a_batch():
    def f(q: "f32[2, 4, T, 8]", k: "f32[2, 4, T, 8]", v: "f32[2, 4, T, 8]"):
        return sdpa(q, k, v, None, True, None, False)

    check(raise_attention, f, 0, reason="batch")


def test_captured_layers_with_and_without_a_window():
    changes = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    module = captured("qwen2", **changes)
    before = evaluate(module)
    assert apply(raise_attention, module).hits == {"layer_0": 1, "layer_1": 1, "": 0}
    assert torch.allclose(before[0], evaluate(module)[0], atol=1e-9)
    assert {attention_of(module, name)[1] for name in module.regions()} == {None, 5}
    assert not any("sdpa" in t or t == "ge" for r in module.graphs() for t in targets(module, r))
    assert apply(raise_attention, module).total == 0
