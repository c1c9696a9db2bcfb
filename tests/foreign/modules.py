"""Hand-written language models that no family of ours covers: what a stranger might bring.

Each takes (input_ids, position_ids), [1, T] unless its name says otherwise, and returns logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, HIDDEN, HEADS, WIDTH = 61, 32, 4, 8


class Block(nn.Module):
    """Layer norm, attention by `attend`, a two-matrix MLP with `activation`; serial or parallel."""

    def __init__(self, attend: nn.Module, activation=F.relu, parallel: bool = False) -> None:
        super().__init__()
        self.attend, self.activation, self.parallel = attend, activation, parallel
        self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 48), nn.Linear(48, HIDDEN)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        mixed = self.out(self.attention(self.first(x), positions))
        if self.parallel:
            return x + mixed + self.mlp(self.second(x))
        x = x + mixed
        return x + self.mlp(self.second(x))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    def attention(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, WIDTH)).transpose(-3, -2)
            for part in self.qkv(x).chunk(3, -1)
        )
        return self.attend(q, k, v, positions).transpose(-3, -2).flatten(-2)


class Model(nn.Module):
    """Embeddings, blocks, a norm and a head. learned: add learned positions."""

    def __init__(self, blocks, learned: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(96, HIDDEN) if learned else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.positions is not None:
            x = x + self.positions(position_ids)
        for block in self.blocks:
            x = block(x, position_ids)
        return self.head(self.norm(x))


class Spelled(nn.Module):
    """softmax(mask(cap(q k^T / sqrt(d)))) v, the mask from torch.tril."""

    def __init__(self, softcap: float | None = None, window: int | None = None) -> None:
        super().__init__()
        self.softcap, self.window = softcap, window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        tokens = q.shape[-2]
        seen = torch.tril(torch.ones(tokens, tokens, dtype=torch.bool))
        if self.window is not None:
            seen = seen & ~torch.tril(torch.ones_like(seen), diagonal=-self.window)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


class Called(nn.Module):
    """scaled_dot_product_attention with is_causal, or a mask made of positions."""

    def __init__(self, kind: str, window: int | None = None) -> None:
        super().__init__()
        self.kind, self.window = kind, window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        if self.kind == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.kind == "bidirectional":
            return F.scaled_dot_product_attention(q, k, v)
        distance = positions[..., :, None] - positions[..., None, :]
        seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance < self.window)
        if self.kind == "additive":
            return F.scaled_dot_product_attention(
                q, k, v, torch.where(seen, 0.0, torch.finfo(q.dtype).min)
            )
        return F.scaled_dot_product_attention(q, k, v, seen)


class Table(nn.Module):
    """A stored triangle, cut to the sequence: nanoGPT's way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(96, 96)).view(1, 1, 96, 96))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        tokens = q.size(-2)
        scores = (q @ k.transpose(-2, -1)) * WIDTH**-0.5
        scores = scores.masked_fill(self.bias[:, :, :tokens, :tokens] == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ v


class Alibi(nn.Module):
    """A bias that falls with a power of the distance; spelled out, or given to sdpa."""

    def __init__(self, called: bool, power: int = 1) -> None:
        super().__init__()
        self.called, self.power = called, power
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, HEADS + 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        distance = positions[..., None, :] - positions[..., :, None]
        bias = -(distance.abs() ** self.power)
        bias = (bias * self.slopes[:, None, None]).masked_fill(distance > 0, float("-inf"))
        if self.called:
            return F.scaled_dot_product_attention(q, k, v, bias)
        return (q @ k.transpose(-1, -2) * WIDTH**-0.5 + bias).softmax(-1) @ v


class Turned(nn.Module):
    """Rotary embeddings as products of complex numbers: of a stored table, or made of positions."""

    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.register_buffer("speeds", 100.0 ** -torch.arange(0, 1, 2 / WIDTH))
        angles = torch.arange(96.0)[:, None] * self.speeds
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles))
        self.stored = stored

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        angles = positions[..., None] * self.speeds
        made = torch.complex(angles.cos(), angles.sin())
        turn = self.table[positions] if self.stored else made
        q, k = (self.turned(x, turn.unsqueeze(-3)) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @staticmethod
    def turned(x: Tensor, turn: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn.conj().conj()).flatten(-2)


class MeanOfPast(nn.Module):
    """No attention: the running mean of the values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        return q.sigmoid() * v.cumsum(-2) / (positions[..., None] + 1)


class Convolution(nn.Module):
    """No attention: a causal convolution of three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        tokens = v.shape[-2]
        padded = F.pad(v, (0, 0, 2, 0))
        return sum(padded[..., i : i + tokens, :] * self.weight[i] for i in range(3)) + q * k


def blocks(attend, count: int = 2, **options):
    return [Block(attend(), **options) for _ in range(count)]


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def odd_activation(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.log1p(x.abs()), 0.1 * torch.sin(x)) + F.softplus(x) * 0.2


class Flat(nn.Module):
    """Takes [T]: the batch dimension is added inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        assert input_ids.dim() == 1
        return self.inner(input_ids[None], position_ids[None])[0]


class Shared(Model):
    """One block's weights used three times, checkpointed as for training."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(3):
            x = checkpoint(self.blocks[0], x, position_ids, use_reentrant=False)
        return self.head(self.norm(x))


class Counted(Model):
    """nanoGPT's way: it names its tokens idx, counts them itself, takes the first rows of a second
    table, and gives the last token's logits only.
    """

    def __init__(self, blocks) -> None:
        super().__init__(blocks)
        self.table = nn.Parameter(torch.zeros(1, 90, HIDDEN))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        tokens = idx.shape[1]
        x = self.embed(idx) + self.positions(torch.arange(tokens)) + self.table[:, :tokens]
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x)[:, [-1], :]), None


def held_oddly(model: nn.Module) -> nn.Module:
    """Hold weights transposed, and as parts of larger buffers."""
    for block in model.blocks:
        block.qkv.weight = nn.Parameter(torch.empty(HIDDEN, 3 * HIDDEN).t())
        block.up.weight = nn.Parameter(torch.empty(HIDDEN + 48, HIDDEN)[HIDDEN:])
        block.down.weight = nn.Parameter(torch.empty(HIDDEN, 2 * 48)[:, ::2])
    model.table = nn.Parameter(torch.empty(HIDDEN, 90).t()[None])
    return model


def causal() -> nn.Module:
    return Called("causal")


GENERATABLE = {
    "spelled": lambda: Model(blocks(Spelled)),
    "spelled_softcap_window": lambda: Model(blocks(lambda: Spelled(3.0, 5))),
    "bool_mask": lambda: Model(blocks(lambda: Called("bool"))),
    "additive_mask_window": lambda: Model(blocks(lambda: Called("additive", 6))),
    "stored_triangle": lambda: Model(blocks(Table)),
    "parallel": lambda: Model(blocks(causal, parallel=True, activation=F.mish)),
    "squared_relu": lambda: Model(blocks(causal, activation=squared_relu)),
    "odd_activation": lambda: Model(blocks(causal, activation=odd_activation)),
    "no_positions": lambda: Model(blocks(causal), learned=False),
    "one_layer": lambda: Model(blocks(causal, 1)),
    "two_kinds": lambda: Model([Block(causal()), Block(Spelled(2.0, 4), F.gelu, True)]),
    "shared_weights": lambda: Shared(blocks(causal, 1)),
    "alibi_spelled": lambda: Model(blocks(lambda: Alibi(False))),
    "alibi_called": lambda: Model(blocks(lambda: Alibi(True))),
    "complex_table": lambda: Model(blocks(lambda: Turned(True))),
    "complex_angles": lambda: Model(blocks(lambda: Turned(False))),
    "flat": lambda: Flat(Model(blocks(causal))),
    "counted": lambda: held_oddly(Counted(blocks(causal))),
}
CALLABLE = {
    "running_mean": (lambda: Model(blocks(MeanOfPast)), "cumsum"),
    "convolution": (lambda: Model(blocks(Convolution)), "pad"),
    "squared_alibi": (lambda: Model(blocks(lambda: Alibi(False, 2))), "bias"),
    "mean_of_all": (lambda: MeanOfAll(blocks(causal, 1)), "mean"),
}


class MeanOfAll(Model):
    """Every token sees the mean of all, in the outer graph, behind paged attention."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.blocks[0](x, position_ids)
        return self.head(self.norm(x - x.mean(1, keepdim=True)))


def build(make) -> nn.Module:
    """Make a model of unit-gain weights, seeded, in eval mode."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3))
            if p.dim() == 1:
                p.add_(0.5)
    return model.eval()
