"""What the passes of the first stage look for, each in several spellings."""

from __future__ import annotations

SOURCES: dict[str, tuple[str, ...]] = {
    "widen_activations": (
        """
def half_exp(x: "bf16[T, D]", w: "weight bf16[D]"):
    h = aten._to_copy.default(x, dtype=torch.float32)
    h = aten._to_copy.default(torch.exp(torch.clamp(h, -4.0, 4.0)), dtype=torch.bfloat16)
    return torch.mul(w, h)
""",
        """
def half_linear(x: "f16[T, D]", w: "weight f16[N, D]"):
    h = F.linear(x, w)
    return torch.tanh(h)
""",
        """
def half_norm(x: "bf16[T, D]", w: "weight bf16[D]"):
    h = aten._to_copy.default(x, dtype=torch.float32)
    scale = torch.rsqrt(torch.add(torch.mean(torch.mul(h, h), -1, True), 1e-05))
    h = aten._to_copy.default(torch.mul(h, scale), dtype=torch.bfloat16)
    return torch.mul(h, w)
""",
    ),
    "fold_constants": (
        """
def one_plus_w(x: "f32[T, D]", w: "weight f32[D]"):
    y = torch.mul(x, torch.add(w, 1.0))
    return torch.clone(torch.mul(y, 1.0))
""",
        """
def folded_table(x: "f32[T, D]", w: "weight f32[D]"):
    table = torch.cos(torch.mul(w, 3.0))
    y = torch.mul(x, table)
    return torch.add(y, 0.0)
""",
        """
def scaled_matrix(x: "f32[T, D]", w: "weight f32[N, D]", s: "weight f32[N, 1]"):
    matrix = torch.mul(w, s)
    return F.linear(x, matrix)
""",
    ),
    "eliminate_common_subexpressions": (
        """
def twice(x: "f32[T, D]", c: "f32[T, D]"):
    a = torch.mul(x, torch.sin(c))
    b = torch.mul(torch.sin(c), x)
    return torch.sub(torch.tanh(a), b)
""",
        """
def mean_twice(x: "f32[T, D]"):
    centred = torch.sub(x, torch.mean(x, -1, True))
    return torch.mul(centred, torch.mean(x, -1, True))
""",
    ),
    "raise_linear": (
        """
def functional(x: "f32[T, D]", w: "weight f32[N, D]", b: "weight f32[N]"):
    return F.linear(x, w, b)
""",
        """
def batched(x: "f32[1, T, D]", w: "weight f32[N, D]", b: "weight f32[N]"):
    h = torch.matmul(x, torch.transpose(w, 0, 1))
    return torch.add(h, b)
""",
        """
def conv1d(x: "f32[T, D]", w: "weight f32[D, N]", b: "weight f32[N]"):
    return torch.addmm(b, x, w)
""",
        """
def product(x: "f32[T, D]", w: "weight f32[D, N]"):
    return torch.mm(x, w)
""",
        """
def of_heads(x: "f32[T, H, E]", w: "weight f32[N, E]"):
    return F.linear(x, w)
""",
    ),
    "raise_expert_linear": (
        """
def chosen(x: "f32[T, D]", w: "weight f32[K, N, D]", e: "i64[T] < K"):
    y = torch.bmm(aten.index.Tensor(w, [e]), torch.unsqueeze(x, -1))
    return torch.squeeze(y, -1)
""",
        """
def routed(x: "f32[T, D]", r: "weight f32[K, D]", w: "weight f32[K, N, D]", b: "weight f32[K, N]"):
    ranks = torch.mul(torch.arange(r.size(0)), 0.001)
    scores = torch.add(F.linear(x, r), ranks)
    e = torch.select(torch.topk(scores, 1).indices, 1, 0)
    y = torch.squeeze(torch.bmm(aten.index.Tensor(w, [e]), torch.unsqueeze(x, -1)), -1)
    return torch.add(y, aten.index.Tensor(b, [e]))
""",
    ),
    "raise_rms_norm": (
        """
def rsqrt(x: "f32[T, D]", w: "weight f32[D]"):
    mean = torch.mean(torch.pow(x, 2), -1, True)
    scale = torch.rsqrt(torch.add(mean, 1e-06))
    return torch.mul(w, torch.mul(x, scale))
""",
        """
def division(x: "f32[T, D]", w: "weight f32[D]"):
    mean = torch.mean(torch.mul(x, x), -1, True)
    root = torch.sqrt(torch.add(mean, 1e-05))
    return torch.mul(torch.div(x, root), w)
""",
        """
def without_weight(x: "f32[T, D]"):
    mean = torch.mean(torch.square(x), -1, True)
    return torch.mul(x, torch.rsqrt(torch.add(mean, 1e-06)))
""",
        """
def of_heads(x: "f32[T, H, E]", w: "weight f32[E]"):
    mean = torch.mean(torch.pow(x, 2), -1, True)
    return torch.mul(torch.mul(x, torch.rsqrt(torch.add(mean, 1e-05))), w)
""",
        """
def of_heads_before_a_linear(x: "f32[T, H, E]", g: "weight f32[E]", w: "weight f32[N, HE]"):
    mean = torch.mean(torch.pow(x, 2), -1, True)
    h = torch.mul(torch.mul(x, torch.rsqrt(torch.add(mean, 1e-05))), g)
    return F.linear(torch.reshape(h, [-1, HE]), w)
""",
    ),
    "raise_layer_norm": (
        """
def functional(x: "f32[T, D]", w: "weight f32[D]", b: "weight f32[D]"):
    return F.layer_norm(x, [D], w, b, 1e-05)
""",
        """
def spelled(x: "f32[T, D]", w: "weight f32[D]", b: "weight f32[D]"):
    centred = torch.sub(x, torch.mean(x, -1, True))
    variance = torch.mean(torch.mul(centred, centred), -1, True)
    scale = torch.rsqrt(torch.add(variance, 1e-05))
    return torch.add(torch.mul(torch.mul(centred, scale), w), b)
""",
        """
def bare(x: "f32[T, D]"):
    return F.layer_norm(x, [D])
""",
    ),
    "raise_rope": (
        """
def halves(x: "f32[T, H, E]", c: "f32[T, E]", s: "f32[T, E]"):
    low = torch.narrow(x, 2, 0, E2)
    high = torch.narrow(x, 2, E2, E2)
    turned = torch.cat([torch.neg(high), low], -1)
    straight = torch.mul(x, torch.unsqueeze(c, -2))
    return torch.add(straight, torch.mul(turned, torch.unsqueeze(s, -2)))
""",
        """
def heads_first(x: "f32[H, T, E]", c: "f32[T, E]", s: "f32[T, E]"):
    low, high = torch.split(x, E2, -1)
    turned = torch.cat([torch.neg(high), low], -1)
    return torch.add(torch.mul(x, c), torch.mul(turned, s))
""",
        """
def half_tables(x: "f32[T, H, E]", c: "f32[T, 1, E2]", s: "f32[T, 1, E2]"):
    low, high = torch.split(x, E2, -1)
    first = torch.sub(torch.mul(low, c), torch.mul(high, s))
    second = torch.add(torch.mul(high, c), torch.mul(low, s))
    return torch.cat([first, second], -1)
""",
        """
def neighbours(x: "f32[T, H, E]", c: "f32[T, 1, E]", s: "f32[T, 1, E]"):
    even = aten.slice.Tensor(x, 2, 0, E, 2)
    odd = aten.slice.Tensor(x, 2, 1, E, 2)
    turned = torch.flatten(torch.stack([torch.neg(odd), even], -1), -2)
    return torch.add(torch.mul(x, c), torch.mul(turned, s))
""",
    ),
    "raise_gated_mlp": (
        """
def silu(gate: "f32[T, D]", up: "f32[T, D]"):
    return torch.mul(up, F.silu(gate))
""",
        """
def gelu(gate: "f32[T, D]", up: "f32[T, D]"):
    return torch.mul(F.gelu(gate), up)
""",
        """
def spelled_silu(gate: "f32[T, D]", up: "f32[T, D]"):
    act = torch.mul(gate, torch.sigmoid(gate))
    return torch.mul(act, up)
""",
        """
def relu_of_heads(gate: "f32[T, H, E]", up: "f32[T, H, E]"):
    return torch.mul(torch.relu(gate), up)
""",
    ),
    "eliminate_views": (
        """
def transposes(x: "f32[1, T, H, E]"):
    y = torch.exp(torch.clamp(torch.permute(x, [0, 2, 1, 3]), -3.0, 3.0))
    y = torch.permute(torch.select(y, 0, 0), [1, 0, 2])
    return torch.reshape(torch.clone(y), [-1, HE])
""",
        """
def chain(x: "f32[T, HE]"):
    heads = torch.reshape(x, [-1, H, E])
    turned = torch.transpose(torch.unsqueeze(heads, 0), 1, 2)
    back = torch.transpose(turned, 1, 2)
    return torch.reshape(back, [-1, HE])
""",
        """
def copies(x: "f32[T, D]"):
    y = torch.squeeze(torch.unsqueeze(torch.clone(x), 0), 0)
    return torch.relu(torch.transpose(torch.transpose(y, 0, 1), 0, 1))
""",
    ),
}
