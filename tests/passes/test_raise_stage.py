"""The raising passes in their order on whole models: hits of one layer are a contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aios_compile.ir.module import IRModule
from aios_compile.passes.pipeline import RAISE
from aios_compile.passes.token_mixing import mixing_nodes
from tests.passes.helpers import SMALL as SIZES
from tests.passes.helpers import apply, captured, captured_module, evaluate, hugging_face, targets
from tests.variants import nightly

NAMES = ("linear", "rms_norm", "layer_norm", "rope", "attention", "gated_mlp")
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
DECODERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "llama": ({}, (7, 2, 0, 2, 1, 1)),
    "mistral": ({"sliding_window": 5}, (7, 2, 0, 2, 1, 1)),
    "qwen2": (WINDOW, (7, 2, 0, 2, 1, 1)),
    "qwen3": ({}, (7, 4, 0, 2, 1, 1)),
}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Llama": (SIZES, (7, 2, 0, 2, 1, 1)),
    "Gemma2": ({**SIZES, "head_dim": 8, "num_key_value_heads": 2}, (7, 4, 0, 2, 1, 1)),
    "Cohere": (SIZES, (7, 0, 1, 2, 1, 1)),
    "GPT2": ({}, (4, 0, 2, 0, 1, 0)),
    "GPTNeoX": ({}, (4, 0, 2, 2, 1, 0)),
    "Phi": (SIZES, (6, 0, 1, 2, 1, 0)),
    "Glm": ({**SIZES, "head_dim": 8, "pad_token_id": 0}, (6, 2, 0, 2, 1, 1)),
}


def raised(module: IRModule) -> tuple[int, ...]:
    """Run the stage; return the hits of the first layer region and check values and fixpoint."""
    before = evaluate(module)
    hits = {f.__name__: apply(f, module).hits for f in RAISE.passes}
    after = evaluate(module)
    assert torch.allclose(before[0], after[0], atol=1e-9 * float(before[0].abs().max()))
    assert mixing_nodes(module) == []
    region = next(iter(module.regions()))
    return tuple(hits[f"raise_{name}"][region] for name in NAMES)


@pytest.mark.parametrize("name", ["qwen3", "mistral", *nightly("llama", "qwen2")])
def test_reference_decoder(name: str) -> None:
    changes, expected = DECODERS[name]
    module = captured(name, torch.bfloat16, **changes)
    assert raised(module) == expected
    for region in module.regions():
        assert {t for t in targets(module, region) if not t.startswith("aios.")} == {"view", "add"}


@pytest.mark.parametrize(
    "name", ["GPT2", "Gemma2", "Cohere", *nightly("Llama", "GPTNeoX", "Phi", "Glm")]
)
def test_hugging_face_family(name: str) -> None:
    import transformers

    changes, expected = FAMILIES[name]
    if changes:
        config = getattr(transformers, f"{name}Config")(**changes)
        module = captured_module(getattr(transformers, f"{name}ForCausalLM")(config))
    else:
        module = hugging_face(name)
    assert raised(module) == expected
    for region in module.regions():
        assert not {"permute", "mm", "addmm", "bmm", "_softmax"} & set(targets(module, region))


class Block(nn.Module):
    """A parallel block that no family has: fused projection, pairs of neighbours, one key head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.fused = nn.Linear(32, 32 + 8 + 8 + 48 + 48, bias=False)
        self.out = nn.Parameter(torch.randn(80, 32))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        parts = self.fused(self.norm(x)).split((32, 8, 8, 48, 48), -1)
        q, k, v = (p.unflatten(-1, (-1, 8)).transpose(0, 1) for p in parts[:3])
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        scores = torch.matmul(q * 8**-0.5, k.expand(4, -1, -1).transpose(1, 2))
        hidden = positions[None, :] > positions[:, None]
        weights = scores.masked_fill(hidden, -1e9).softmax(-1)
        mixed = (weights @ v.expand(4, -1, -1)).transpose(0, 1).flatten(1)
        return x + torch.cat((mixed, parts[4] * F.relu(parts[3])), -1) @ self.out

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class Unknown(nn.Module):
    """A causal language model that is nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(101, 32)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(4) / 4), persistent=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        angles = position_ids[:, None] * self.frequencies
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), position_ids)
        return F.rms_norm(x, (32,)) @ self.table.weight.t()


def test_a_module_that_nobody_thought_of() -> None:
    module = captured_module(Unknown(), flat=True)
    assert raised(module) == (2, 0, 1, 2, 1, 1)
    assert not {"bmm", "_softmax", "where", "gt"} & set(targets(module, "layer"))
    (node,) = (n for n in module.regions()["layer"].graph.nodes if "attention" in n.name)
    assert [a.meta["val"].shape[1] for a in node.args[:3]] == [4, 1, 1]
