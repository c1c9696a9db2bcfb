"""Small programs at the semantic level: written with aios ops, captured, with layers as regions."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from aios_compile.capture.capture import capture
from aios_compile.ir import sample_op, snapshot
from aios_compile.ir.module import IRModule, Level, placeholders
from tests.passes import helpers

aios = torch.ops.aios
HIDDEN, HEADS, GROUPS, WIDTH, INNER, VOCABULARY = 32, 4, 2, 8, 48, 61
PAGE, PAGES, TABLE = 16, 64, 8


class Layer(nn.Module):
    """A pre-norm decoder layer in aios ops; `qk_norm` as Qwen3, `bias` as Qwen2."""

    def __init__(self, qk_norm: bool, bias: bool, window: int | None, rope: bool = True) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, HEADS * WIDTH, bias=bias)
        self.k = nn.Linear(HIDDEN, GROUPS * WIDTH, bias=bias)
        self.v = nn.Linear(HIDDEN, GROUPS * WIDTH, bias=bias)
        self.o = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False)
        self.gate = nn.Linear(HIDDEN, INNER, bias=False)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        self.norm1 = nn.Parameter(torch.ones(HIDDEN))
        self.norm2 = nn.Parameter(torch.ones(HIDDEN))
        self.q_norm = nn.Parameter(torch.ones(WIDTH)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(WIDTH)) if qk_norm else None
        self.window, self.rope = window, rope

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = aios.rms_norm(x, self.norm1, 1e-6, True)
        q = linear(self.q, h).unflatten(-1, (-1, WIDTH))
        k = linear(self.k, h).unflatten(-1, (-1, WIDTH))
        v = linear(self.v, h).unflatten(-1, (-1, WIDTH))
        if self.q_norm is not None:
            q = aios.rms_norm(q, self.q_norm, 1e-6, True)
            k = aios.rms_norm(k, self.k_norm, 1e-6, True)
        if self.rope:
            q, k = aios.rope(q, cos, sin, False), aios.rope(k, cos, sin, False)
        out = aios.attention(q, k, v, WIDTH**-0.5, self.window, None, None, None)
        x = x + linear(self.o, out.flatten(-2))
        h = aios.rms_norm(x, self.norm2, 1e-6, True)
        gated = aios.gated_activation(linear(self.gate, h), linear(self.up, h), "silu")
        return x + linear(self.down, gated)


class Model(nn.Module):
    """Embedding, `num_layers` layers, final norm, head."""

    def __init__(self, num_layers: int, **layer: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(**layer) for _ in range(num_layers))
        self.norm = nn.Parameter(torch.ones(HIDDEN))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        frequencies = 100.0 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2))
        angles = position_ids[:, None] * torch.cat((frequencies, frequencies))
        cos, sin = angles.cos(), angles.sin()
        x = self.run_layers(self.embed(input_ids), cos, sin)
        return linear(self.head, aios.rms_norm(x, self.norm, 1e-6, True))

    def run_layers(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.ops.aios.linear(x, layer.weight, layer.bias)


def program(
    num_layers: int = 2, qk_norm: bool = True, bias: bool = False, window: int | None = None
) -> IRModule:
    """Return level 2 of a small decoder with seeded weights."""
    return snapshot.take(_captured(num_layers, qk_norm, bias, window))


@functools.cache
def _captured(num_layers: int, qk_norm: bool, bias: bool, window: int | None) -> IRModule:
    torch.manual_seed(3)
    model = Model(num_layers, qk_norm=qk_norm, bias=bias, window=window)
    for p in model.parameters():
        p.data.uniform_(0.5, 1.5) if p.dim() == 1 else p.data.normal_(0, p.shape[-1] ** -0.5)
    module = capture(model.eval().requires_grad_(False), flat=True)
    module.tensors.update(model.named_parameters())
    module.level = Level.SEMANTIC
    return module


def empty_caches(module: IRModule) -> dict[str, Tensor]:
    """Return poisoned caches: what attention must not read is NaN."""
    nodes = [n for n in placeholders(module.root.graph) if n.name in module.states]
    return {n.name: torch.full(n.meta["val"].shape, 1e3).double() for n in nodes}


def step(
    module: IRModule, chunks: list[tuple[list[int], int, list[int]]], caches: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Run one step. chunks: (token ids, position of the first, pages) a sequence.

    Return outputs by name, a row of logits for every token; `caches` is updated.
    """
    lengths = [len(ids) for ids, _, _ in chunks]
    positions = torch.cat([torch.arange(at, at + len(ids)) for ids, at, _ in chunks])
    pages = [torch.tensor(p)[torch.arange(at, at + len(i)) // PAGE] for i, at, p in chunks]
    tables = torch.zeros(len(chunks), TABLE, dtype=torch.int64)
    for row, (_, _, own) in enumerate(chunks):
        tables[row, : len(own)] = torch.tensor(own)
    tokens = sum(lengths)
    values = {
        "token_ids": torch.tensor([i for ids, _, _ in chunks for i in ids]),
        "positions": positions,
        "slots": torch.cat(pages) * PAGE + positions % PAGE,
        "query_starts": torch.tensor([0, *lengths]).cumsum(0),
        "context_lengths": torch.tensor([at + len(ids) for ids, at, _ in chunks]),
        "page_tables": tables,
        "logit_rows": torch.arange(tokens),
        **sampling(tokens),
    }
    results = helpers.evaluate(module, {**values, **caches}, tokens)
    for name, index in module.states.items():
        caches[name] = results[index]
    return dict(zip(module.outputs, results))


def sampling(rows: int) -> dict[str, Tensor]:
    """Return greedy sampling parameters for `rows` rows."""
    neutral = {"top_p": 1.0, "repetition_penalty": 1.0}
    values = {}
    for name, (dtype, size) in sample_op.INPUTS.items():
        length = {"R": rows, "R+1": rows + 1}.get(size, 0)
        values[name] = torch.full((length,), neutral.get(name, 0), dtype=dtype)
    return values
