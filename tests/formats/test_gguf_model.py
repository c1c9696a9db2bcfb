"""GGUF files of the zoo's models: the same weights bit for bit, same config, same logits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import aios_compile
from aios_compile.checkpoint.gguf import GgufCheckpoint
from aios_compile.checkpoint.gguf_header import read_gguf_header
from aios_compile.codegen.packing import has_halves, in_order, kind_of, unpack_quant16
from aios_compile.config import CompileOptions
from aios_compile.errors import CheckpointError
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantized import dequantize
from aios_compile.model_source import open_source
from aios_compile.models.config import ModelConfig
from aios_compile.models.decoder import Decoder
from tests import zoo
from tests.formats.gguf_files import convert, with_weights

# name of a zoo model -> the type of its matrices (the embedding may differ)
MODELS: dict[str, tuple[Kind, Kind]] = {
    "llama_gqa": (Kind.Q8_0, Kind.Q8_0),
    "llama_tied": (Kind.Q4_0, Kind.Q8_0),
    "llama_attention_bias": (Kind.Q5_0, Kind.F16),
    "llama_mlp_bias": (Kind.Q5_1, Kind.F32),
    "llama_head_dim": (Kind.BF16, Kind.BF16),
    "llama_theta": (Kind.F16, Kind.F16),
    "llama_linear": (Kind.F32, Kind.F32),
    "llama_llama3": (Kind.Q8_0, Kind.F32),
    "llama_yarn": (Kind.F32, Kind.F32),
    "mistral_full": (Kind.Q4_1, Kind.Q8_0),
    "mistral_window": (Kind.Q8_0, Kind.Q8_0),
    "qwen2_tied": (Kind.Q8_0, Kind.Q8_0),
    "qwen2_yarn": (Kind.F32, Kind.F32),
    "qwen3_gqa": (Kind.Q4_1, Kind.Q8_0),
    "qwen3_bias": (Kind.Q5_1, Kind.Q8_0),
}


def kinds(matrices: Kind, embedding: Kind) -> Callable[[str], Kind]:
    return lambda name: embedding if "embed_tokens" in name else matrices


def make(name: str, tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Return a zoo folder with the weights of the GGUF file, the file, and those weights."""
    source = zoo.make(name, tmp_path)
    path = tmp_path / f"{name}.gguf"
    meant = convert(source, path, kinds(*MODELS[name]))
    return with_weights(source, tmp_path / f"{name}-meant", meant), path, meant


def same(config: ModelConfig) -> ModelConfig:
    """Leave out what names the source and not the mathematics."""
    rope = config.rope
    if rope.rope_type in ("llama3", "frequency_factors"):
        rope = replace(rope, rope_type="llama3", frequency_factors=(), factor=0.0,
                       low_freq_factor=0, high_freq_factor=0,
                       original_max_position_embeddings=0)  # fmt: skip
    kind = "mistral" if config.model_type == "llama" else config.model_type
    return replace(config, rope=rope, model_type=kind, dtype=None, ignored_keys=())


@pytest.mark.parametrize("name", MODELS)
def test_weights_config_and_logits(name: str, tmp_path: Path) -> None:
    folder, path, meant = make(name, tmp_path)
    checkpoint = GgufCheckpoint.open(path)
    config = ModelConfig.from_dict(checkpoint.config, str(path))
    assert same(config) == same(ModelConfig.from_dict(zoo.config_of(name)))
    source = open_source(str(path), CompileOptions.parse({"dtype": "float32"}))
    model = Decoder(config).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        value = source.read(key).float()
        assert torch.equal(value.view(torch.int32), meant[key].view(torch.int32)), key
        parameter.copy_(value)
    ids = zoo.token_ids(folder)
    logits = model(torch.tensor(ids), torch.arange(len(ids)))
    assert (logits - zoo.reference_logits(folder, ids)).abs().max() <= zoo.TOLERANCE


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose rows hold whole blocks of 256, in the types of a Q4_K_M and a Q5_K_M file."""
    folder = tmp_path_factory.mktemp("wide")
    zoo.ZOO["llama_k_types"] = {
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    }  # fmt: skip
    source = zoo.make("llama_k_types", folder)
    types = {"o_proj": Kind.Q5_K, "lm_head": Kind.Q6_K}

    def kind_of(name: str) -> Kind:
        if "layers.1." in name and ("v_proj" in name or "down_proj" in name):
            return Kind.Q6_K  # llama.cpp does so in half of the layers
        return next((kind for part, kind in types.items() if part in name), Kind.Q4_K)

    path = folder / "model.gguf"
    meant = convert(source, path, kind_of)
    # the embedding of random blocks is small: greedy answers still differ from token to token
    return with_weights(source, folder / "meant", meant), path, meant


@pytest.mark.nightly
def test_compiled_k_types(wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: the codes stay codes, to the bit; answers as transformers gives them.

    Layers whose matrices are stored in different types become regions of their own.
    """
    folder, path, meant = wide
    monkeypatch.setenv("AIOS_VERIFY", "1")
    ids = zoo.token_ids(folder)
    with aios_compile.load_and_compile(
        str(path), dtype="float32", progress=False, num_threads=1
    ) as model:
        expected = zoo.reference_logits(folder, ids)
        # activations are rounded to 8 bits (relative error 0.4 %), weights to nothing
        assert (model(ids) - expected).abs().max() <= 0.02 * expected.abs().max()
        report = model.report()
        rows = {row.name: row for row in report.passes}
        assert rows["keep_quantized_weights"].kept
        assert rows["keep_quantized_weights"].hits == 16  # 2 regions of 7, embedding, head
        assert rows["merge_qkv"].hits == 1  # where v is Q6_K, it stays apart
        assert any("Q4_K, Q5_K, Q6_K" in note for note in report.notes)
        assert check_stored(model, meant) == 16  # 7 a layer, embedding and head
        stored = sum(i.end - i.begin for i in read_gguf_header(path).tensors.values())
        taken = sum(t.num_bytes for t in model._artefact.tensors.values())
        assert taken <= 1.04 * stored  # the K types' scales of 6 bits take 8 here


def check_stored(model: aios_compile.CompiledModel, meant: dict[str, torch.Tensor]) -> int:
    """Every quantised weight of the artefact means what the file means, bit for bit.

    Returns how many tensors of the file they are.
    """
    found = 0
    for entry in model.program.weights:
        if kind_of(entry.packed) != "quant16":
            continue
        form = QuantFormat.parse(entry.packed.partition(".")[2])
        packed = np.array(model._artefact.tensor(entry.name))
        packed = in_order(packed) if has_halves(entry.packed) else packed
        got = dequantize(torch.from_numpy(unpack_quant16(packed, form, entry.shape[0])), form)
        parts = re.findall(r"checkpoint\['([^':]+):", entry.recipe)
        assert parts, entry.recipe
        assert torch.equal(got, torch.cat([meant[part] for part in parts])), entry.name
        found += len(parts)
    return found


def test_pieces_are_the_whole(wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor is dequantised some rows at a time."""
    _, path, meant = wide
    monkeypatch.setattr("aios_compile.checkpoint.gguf_weights.PIECE_WEIGHTS", 3 * 256)
    checkpoint = GgufCheckpoint.open(path)
    name = "model.layers.0.self_attn.k_proj.weight"
    pieces = list(checkpoint.weights.pieces(name))
    assert len(pieces) > 20
    assert np.array_equal(np.concatenate([p for _, p in pieces]), meant[name].numpy())
    assert np.array_equal(checkpoint.weights.read(name), meant[name].numpy())
    source = open_source(path, CompileOptions.parse({"dtype": "bfloat16"}))
    assert torch.equal(source.read(name), meant[name].to(torch.bfloat16))


@pytest.mark.parametrize(
    "norms, table, dtype",
    [
        ("bfloat16", Kind.Q8_0, torch.bfloat16),
        ("bfloat16", Kind.BF16, torch.bfloat16),
        ("float16", Kind.F16, torch.float16),
        ("float16", Kind.Q8_0, torch.float16),
        ("float32", Kind.Q8_0, torch.float32),
        ("float32", Kind.F16, torch.float32),
        ("float16", Kind.BF16, torch.float32),
    ],
)
def test_what_is_not_quantised_keeps_its_values(
    norms: str, table: Kind, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Norms are float32 in every file, whatever they were before; a table may be float16."""
    path = tmp_path / "model.gguf"
    meant = convert(zoo.make("qwen3_gqa", tmp_path, norms), path, kinds(Kind.Q8_0, table))
    source = open_source(path, CompileOptions.parse({}))
    plain = {n: p for n, p in source.build().named_parameters() if n not in source.stored_forms()}
    assert len(plain) >= 9 and {p.dtype for p in plain.values()} == {dtype}
    for name in plain:
        assert torch.equal(source.read(name).to(dtype).float(), meant[name]), name


def test_a_folder_with_one_file(wide: Any, tmp_path: Path) -> None:
    path = wide[1]
    (tmp_path / "a.gguf").write_bytes(path.read_bytes())
    assert open_source(tmp_path, CompileOptions.parse({})).files == (tmp_path / "a.gguf",)
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2 GGUF files: a\.gguf, b\.gguf"):
        open_source(tmp_path, CompileOptions.parse({}))
    with pytest.raises(CheckpointError, match="no such file"):
        open_source(str(tmp_path / "c.gguf"), CompileOptions.parse({}))
