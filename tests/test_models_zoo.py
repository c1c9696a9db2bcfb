"""Our eager decoder gives transformers' logits on the zoo, and every component of the zoo
matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aios_compile.models.decoder import Decoder, RMSNorm
from aios_compile.models.parameters import parameter_shapes
from aios_compile.models.rope import RotaryEmbedding
from tests import zoo

torch.set_num_threads(1)
VISIBLE = 100 * zoo.TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@torch.no_grad()
def logits_of(model: Decoder, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor(ids), torch.arange(len(ids)))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_logits_equal_transformers(name: str, folder: Path) -> None:
    path = zoo.make(name, folder)
    model, ids = zoo.decoder(path), zoo.token_ids(path)
    expected = zoo.reference_logits(path, ids)
    assert (logits_of(model, ids) - expected).abs().max() <= zoo.TOLERANCE
    shapes = {k: tuple(p.shape) for k, p in model.named_parameters(remove_duplicate=False)}
    assert shapes == parameter_shapes(model.config)


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_window", "qwen2_dynamic", "qwen3_bias"])
def test_batches_equal_flat_sequences(name: str, folder: Path) -> None:
    model = zoo.decoder(zoo.make(name, folder))
    rows = torch.arange(60).reshape(2, 30) % 128
    with torch.no_grad():
        batch = model(rows, torch.arange(30).expand(2, 30))
        shared = model(rows, torch.arange(30))  # one row of positions for all
    for row, a, b in zip(rows.tolist(), batch, shared):
        expected = logits_of(model, row)
        assert torch.allclose(a, expected, atol=1e-5) and torch.allclose(b, expected, atol=1e-5)


def ablations(name: str, path: Path) -> Iterator[tuple[str, Decoder]]:
    """Yield the model with one component taken out, for every component that it has."""
    config = zoo.decoder(path).config
    norms = ["input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"]
    for norm in norms[: 5 if config.qk_norm else 3]:
        model = zoo.decoder(path)
        for key, module in model.named_modules():
            if isinstance(module, RMSNorm) and key.rsplit(".", 1)[-1] == norm:
                module.weight.data.fill_(1.0)
        yield f"the weight of {norm}", model
        model = zoo.decoder(path)
        for key, module in model.named_modules():
            if isinstance(module, RMSNorm) and key.rsplit(".", 1)[-1] == norm:
                module.forward = lambda x, weight=module.weight: x * weight  # type: ignore
        yield f"the quotient of {norm}", model
    parameters = dict(zoo.decoder(path).named_parameters())
    for bias in sorted({key.split(".", 3)[3] for key in parameters if key.endswith(".bias")}):
        model = zoo.decoder(path)
        for key, parameter in model.named_parameters():
            if key.endswith(bias):
                parameter.data.zero_()
        yield bias, model
    for i, window in enumerate(config.windows):
        if window is not None:
            for other in (None, window + 1, window - 1):
                model = zoo.decoder(path)
                model.model.layers[i].self_attn.window = other
                yield f"window {window} -> {other} of layer {i}", model
    model = zoo.decoder(path)
    model.model.rotary_emb.inv_freq.zero_()
    model.model.rotary_emb.rope = dataclasses.replace(config.rope, rope_type="default")
    yield "RoPE", model
    if config.rope.rope_type != "default" or config.rope.rotary_dim != config.head_dim:
        model = zoo.decoder(path)
        plain = {"rope_type": "default", "rotary_dim": config.head_dim, "attention_factor": 1.0}
        model.model.rotary_emb = RotaryEmbedding(dataclasses.replace(config.rope, **plain))
        yield f"RoPE {config.rope.rope_type}", model
    if config.rope.attention_factor != 1.0:
        model = zoo.decoder(path)
        model.model.rotary_emb.rope = dataclasses.replace(config.rope, attention_factor=1.0)
        yield "the attention factor", model


@pytest.mark.parametrize("name", zoo.ZOO)
def test_each_component_moves_the_logits(name: str, folder: Path) -> None:
    path = zoo.make(name, folder)
    ids = zoo.token_ids(path)
    whole = logits_of(zoo.decoder(path), ids)
    for component, model in ablations(name, path):
        moved = (logits_of(model, ids) - whole).abs().max()
        assert moved >= VISIBLE, f"{component} moves the logits by {moved:.2g} only"


def test_bfloat16_is_as_near_to_fp32_as_transformers(folder: Path) -> None:
    for name in ("llama_gqa", "qwen2_tied", "qwen3_window", "mistral_window"):
        path = zoo.make(name, folder, "bfloat16")
        ids = zoo.token_ids(path)
        exact = zoo.reference_logits(path, ids)
        theirs = (zoo.reference_logits(path, ids, "bfloat16") - exact).abs().mean()
        ours = (logits_of(zoo.decoder(path, "bfloat16"), ids).float() - exact).abs().mean()
        assert ours <= 1.1 * theirs


def test_meta_construction_keeps_real_frequencies(folder: Path) -> None:
    with torch.device("meta"):
        model = Decoder(zoo.decoder(zoo.make("llama_yarn", folder)).config)
    assert all(p.is_meta for p in model.parameters())
    assert all(b.device.type == "cpu" for b in model.buffers())
    assert not any("inv_freq" in key for key in model.state_dict())
