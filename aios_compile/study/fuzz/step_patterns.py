"""What the later passes look for: paging, merging, quantising, fusing."""

from __future__ import annotations

_HEADS = """
    q = torch.reshape(F.linear(x, wq), [-1, H, E])
    k = torch.reshape(F.linear(x, wk), [-1, G, E])
    v = torch.reshape(F.linear(x, wv), [-1, G, E])
"""
_TURN = """
    q1, q2 = torch.split(q, E2, -1)
    k1, k2 = torch.split(k, E2, -1)
    c1 = torch.unsqueeze(c, -2)
    s1 = torch.unsqueeze(s, -2)
    tq = torch.cat([torch.neg(q2), q1], -1)
    tk = torch.cat([torch.neg(k2), k1], -1)
    q = torch.add(torch.mul(q, c1), torch.mul(tq, s1))
    k = torch.add(torch.mul(k, c1), torch.mul(tk, s1))
"""
_QKV = 'wq: "weight f32[HE, D]", wk: "weight f32[GE, D]", wv: "weight f32[GE, D]"'
_ATTEND = """
    q = torch.unsqueeze(torch.transpose(q, 0, 1), 0)
    k = torch.unsqueeze(torch.transpose(k, 0, 1), 0)
    v = torch.unsqueeze(torch.transpose(v, 0, 1), 0)
    out = aios.sdpa.default(q, k, v, None, True, None, True)
    out = torch.transpose(torch.squeeze(out, 0), 0, 1)
    return torch.reshape(out, [-1, HE])
"""
CALLED = """
def called(q: "f32[T, H, E]", k: "f32[T, G, E]", v: "f32[T, G, E]"):
    q = torch.permute(q, [1, 0, 2])
    k = torch.permute(k, [1, 0, 2])
    v = torch.permute(v, [1, 0, 2])
    out = aios.sdpa.default(q, k, v, None, True, None, True)
    return torch.permute(out, [1, 0, 2])
"""
SPELLED = """
def spelled(q: "f32[T, H, E]", k: "f32[T, H, E]", v: "f32[T, H, E]"):
    scores = torch.bmm(torch.transpose(q, 0, 1), torch.permute(k, [1, 2, 0]))
    row = torch.arange(scores.size(1))
    later = torch.gt(torch.unsqueeze(row, 0), torch.unsqueeze(row, 1))
    hidden = torch.masked_fill(torch.mul(scores, 0.3), later, -1e30)
    out = torch.bmm(torch.softmax(hidden, -1), torch.transpose(v, 0, 1))
    return torch.transpose(out, 0, 1)
"""
WINDOW = """
def window(q: "f32[T, H, E]", k: "f32[T, H, E]", v: "f32[T, H, E]"):
    scores = torch.bmm(torch.transpose(q, 0, 1), torch.permute(k, [1, 2, 0]))
    row = torch.arange(scores.size(1))
    distance = torch.sub(torch.unsqueeze(row, 1), torch.unsqueeze(row, 0))
    seen = torch.logical_and(torch.ge(distance, 0), torch.lt(distance, W))
    hidden = torch.where(seen, torch.mul(scores, 0.25), -1e30)
    out = torch.bmm(torch.softmax(hidden, -1), torch.transpose(v, 0, 1))
    return torch.transpose(out, 0, 1)
"""
SOFTCAP = """
def softcap(q: "f32[T, H, E]", k: "f32[T, H, E]", v: "f32[T, H, E]"):
    scores = torch.bmm(torch.transpose(q, 0, 1), torch.permute(k, [1, 2, 0]))
    capped = torch.mul(torch.tanh(torch.div(torch.mul(scores, 0.2), 5.0)), 5.0)
    row = torch.arange(scores.size(1))
    later = torch.gt(torch.unsqueeze(row, 0), torch.unsqueeze(row, 1))
    hidden = torch.masked_fill(capped, later, -1e30)
    out = torch.bmm(torch.softmax(hidden, -1), torch.transpose(v, 0, 1))
    return torch.transpose(out, 0, 1)
"""
STEPS: dict[str, tuple[str, ...]] = {
    "raise_attention": (CALLED, SPELLED, WINDOW, SOFTCAP),
    "raise_sequence_lengths": (
        """
def longest(x: "f32[T, D]", positions: "input i64[T]"):
    length = torch.add(torch.amax(positions, -1, True), 1)
    factor = torch.div(torch.mul(torch.expand_copy(length, [positions.size(0)]), 0.5), 9.0)
    return torch.mul(x, torch.unsqueeze(torch.sin(factor), -1))
""",
        """
def scaled(x: "f32[T, D]", positions: "input i64[T]"):
    length = torch.add(torch.amax(positions, -1, True), 1)
    ratio = torch.clamp(torch.div(length, 12.0), 1.0, 4.0)
    angle = torch.div(positions, ratio)
    return torch.mul(x, torch.unsqueeze(torch.cos(angle), -1))
""",
    ),
    "raise_positions": (
        """
def counted(x: "f32[T, D]"):
    place = torch.div(torch.arange(x.size(0)), 9.0)
    return torch.mul(x, torch.unsqueeze(torch.cos(place), -1))
""",
        """
def numbered(x: "f32[T, D]", positions: "input i64[T]"):
    place = torch.sub(torch.arange(x.size(0)), torch.mul(positions, 2))
    return torch.mul(x, torch.unsqueeze(torch.mul(place, 0.5), -1))
""",
        """
def first_rows(x: "f32[T, D]", w: "weight f32[64, D]"):
    return torch.add(x, torch.narrow(w, 0, 0, x.size(0)))
""",
    ),
    "page_attention": (CALLED, WINDOW),
    "gather_last_tokens": (
        """
def head(x: "f32[T, D]", w: "weight f32[D]", v: "weight f32[V, D]"):
    mean = torch.mean(torch.pow(x, 2), -1, True)
    h = torch.mul(torch.mul(x, torch.rsqrt(torch.add(mean, 1e-06))), w)
    return F.linear(h, v)
""",
        """
def capped(x: "f32[T, D]", v: "weight f32[V, D]"):
    return torch.mul(torch.tanh(torch.div(F.linear(x, v), 3.0)), 3.0)
""",
    ),
    "sample_tokens": (
        """
def head(x: "f32[T, D]", v: "weight f32[V, D]"):
    return F.linear(torch.tanh(x), v)
""",
    ),
    "merge_qkv": (
        f'def merged(x: "f32[T, D]", {_QKV}):{_HEADS}{_ATTEND}',
        f'def rotated(x: "f32[T, D]", c: "f32[T, E]", s: "f32[T, E]", {_QKV}):'
        f"{_HEADS}{_TURN}{_ATTEND}",
    ),
    "merge_gate_up": (
        """
def swiglu(x: "f32[T, D]", wg: "weight f32[N, D]", wu: "weight f32[N, D]"):
    gate = F.linear(x, wg)
    up = F.linear(x, wu)
    return torch.mul(F.silu(gate), up)
""",
        """
def geglu(x: "f32[T, D]", wg: "weight f32[N, D]", bg: "weight f32[N]", wu: "weight f32[N, D]",
          bu: "weight f32[N]"):
    gate = F.linear(x, wg, bg)
    up = F.linear(x, wu, bu)
    return torch.mul(up, F.gelu(gate, approximate="tanh"))
""",
    ),
    "fuse_qk_norm_rope_kv_write": (
        f'def rotated(x: "f32[T, D]", c: "f32[T, E]", s: "f32[T, E]", {_QKV}):'
        f"{_HEADS}{_TURN}{_ATTEND}",
        f'def normed(x: "f32[T, D]", c: "f32[T, E]", s: "f32[T, E]", {_QKV}, '
        'n: "weight f32[E]", m: "weight f32[E]"):'
        f"""{_HEADS}
    qm = torch.mean(torch.pow(q, 2), -1, True)
    q = torch.mul(n, torch.mul(q, torch.rsqrt(torch.add(qm, 1e-06))))
    km = torch.mean(torch.pow(k, 2), -1, True)
    k = torch.mul(m, torch.mul(k, torch.rsqrt(torch.add(km, 1e-06))))
{_TURN}{_ATTEND}""",
    ),
}
LINEAR = """
def linear(x: "f32[T, Q]", w: "weight f32[M, Q]"):
    return F.linear(x, w)
"""
PAIR = """
def pair(x: "f32[T, Q]", wg: "weight f32[M, Q]", wu: "weight f32[M, Q]"):
    return torch.mul(F.silu(F.linear(x, wg)), F.linear(x, wu))
"""
QUANTISED = (LINEAR, PAIR)
ROUNDED = """
def rounded(x: "f32[T, Q]", w: "weight bf16[M, Q]"):
    return F.linear(x, aten._to_copy.default(w, dtype=torch.float32))
"""
_ROTATED = (
    f'def rotated(x: "f32[T, D]", c: "f32[T, E]", s: "f32[T, E]", {_QKV}):{_HEADS}{_TURN}{_ATTEND}'
)
STEPS["fuse_kv_write_into_attention"] = (_ROTATED,)
CODES = (CALLED, WINDOW, SOFTCAP, _ROTATED)  # attention whose caches hold codes
FUSED: dict[str, tuple[str, ...]] = {
    "fuse_norm_into_linear": (
        """
def norm_and_linear(x: "f32[T, D]", g: "weight f32[D]", w: "weight f32[N, D]"):
    mean = torch.mean(torch.pow(x, 2), -1, True)
    h = torch.mul(g, torch.mul(x, torch.rsqrt(torch.add(mean, 1e-06))))
    return F.linear(h, w)
""",
        """
def norm_and_gated(x: "f32[T, D]", g: "weight f32[D]", w: "weight f32[N2, D]"):
    mean = torch.mean(torch.pow(x, 2), -1, True)
    y = F.linear(torch.mul(g, torch.mul(x, torch.rsqrt(torch.add(mean, 1e-06)))), w)
    return torch.mul(F.silu(torch.narrow(y, 1, 0, N)), torch.narrow(y, 1, N, N))
""",
    ),
    "own_outputs": (
        """
def part(x: "f32[T, D2]"):
    a = torch.relu(x)
    return torch.narrow(a, 1, 0, D), torch.narrow(x, 1, D, D)
""",
        """
def turned(x: "f32[T, H, E]"):
    a = torch.neg(x)
    return torch.transpose(a, 0, 1), a
""",
    ),
    "copy_strided_inputs": (
        """
def every_second(x: "f32[T, D2]", w: "weight f32[N, D]"):
    a = aten.slice.Tensor(torch.relu(x), 1, 0, D2, 2)
    return F.linear(a, w)
""",
        """
def transposed(x: "f32[D, T]", w: "weight f32[N, D]"):
    return F.linear(torch.transpose(torch.tanh(x), 0, 1), w)
""",
    ),
    "fuse_add_rms_norm": (
        """
def sum_and_norm(x: "f32[T, D]", h: "f32[T, D]", w: "weight f32[D]"):
    y = torch.add(x, h)
    mean = torch.mean(torch.pow(y, 2), -1, True)
    normed = torch.mul(w, torch.mul(y, torch.rsqrt(torch.add(mean, 1e-06))))
    return normed, y
""",
        """
def branch(x: "f32[T, D]", h: "f32[T, D]", w: "weight f32[D]"):
    return torch.add(x, aios.rms_norm.default(torch.sin(h), w, 1e-05, True))
""",
    ),
    "fuse_linear_epilogue": (
        """
def residual(x: "f32[T, D]", r: "f32[T, N]", w: "weight f32[N, D]", b: "weight f32[N]"):
    return torch.add(r, F.linear(x, w, b))
""",
        """
def activation(x: "f32[T, D]", w: "weight f32[N, D]"):
    return torch.mul(F.gelu(F.linear(x, w)), 0.5)
""",
        """
def gated(x: "f32[T, D]", w: "weight f32[N2, D]"):
    y = F.linear(x, w)
    return torch.mul(F.silu(torch.narrow(y, 1, 0, N)), torch.narrow(y, 1, N, N))
""",
        """
def table(i: "i64[T] < V", w: "weight f32[V, D]"):
    return torch.mul(F.embedding(i, w), 8.0)
""",
    ),
    "fuse_pointwise": (
        """
def angles(positions: "i64[T] < 60", inverse: "weight f32[E2]"):
    angle = torch.mul(torch.unsqueeze(positions, -1), inverse)
    both = torch.cat([angle, angle], -1)
    return torch.cos(both), torch.sin(both)
""",
        """
def softmax(x: "f32[T, D]"):
    shifted = torch.exp(torch.sub(x, torch.amax(x, -1, True)))
    return torch.div(shifted, torch.sum(shifted, -1, True))
""",
        """
def chain(x: "f32[T, D]", y: "f32[T, D]"):
    a = torch.mul(torch.sin(x), y)
    return torch.where(torch.gt(a, 0.0), a, torch.abs(torch.sub(x, y)))
""",
    ),
    "form_kernels": (
        """
def linear_view(x: "f32[T, D]", w: "weight f32[HE, D]"):
    y = F.linear(x, w)
    return torch.reshape(y, [-1, H, E])
""",
    ),
}
