"""GPTQ, AWQ and compressed-tensors folders: the weights that their codes mean, bit for bit."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import aios_compile
from aios_compile.checkpoint.folder import CheckpointFolder
from aios_compile.codegen.packing import kind_of
from aios_compile.config import CompileOptions
from aios_compile.errors import AiosError, CheckpointError, UnsupportedModelError
from aios_compile.model_source import open_source
from aios_compile.models.config import ModelConfig
from aios_compile.models.decoder import Decoder
from tests import zoo
from tests.formats.gguf_files import with_weights
from tests.formats.packed_folders import awq, compressed, convert, draw, gptq
from tests.formats.test_gguf_header import hold
from tests.formats.test_gguf_model import check_stored
from tests.quick_builds import build_quickly
from tests.variants import nightly

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def scheme(
    bits: int,
    strategy: str = "group",
    symmetric: bool = True,
    group: int | None = None,
    **more: Any,
) -> Any:
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric,
               "group_size": group}  # fmt: skip
    return {"targets": ["Linear"], "weights": weights, "input_activations": None, **more}


def packed(*groups: Any, **more: Any) -> dict[str, Any]:
    """Return a quantization_config of compressed-tensors."""
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "quantization_status": "compressed", "ignore": ["lm_head"], "kv_cache_scheme": None,
            "config_groups": {f"group_{i}": g for i, g in enumerate(groups)}, **more}  # fmt: skip


# (zoo model, quantization_config, kind of draw, bits, group, scales, how the folder is packed)
CASES: dict[str, tuple[str, Any, str, int, int, torch.dtype, Any]] = {
    "gptq": ("llama_gqa", GPTQ, "sym", 4, 32, torch.float16, gptq),
    "gptq-8-row": ("qwen2_gqa", GPTQ | {"bits": 8, "group_size": -1}, "sym", 8, -1, torch.float16,
                   gptq),
    "gptq-asym": ("qwen3_gqa", GPTQ | {"sym": False}, "asym0", 4, 32, torch.float16, gptq),
    "gptq-order": ("llama_attention_bias", GPTQ | {"desc_act": True}, "asym+order", 4, 32,
                   torch.bfloat16, gptq),
    "gptq-shared": ("llama_gqa", GPTQ | {"desc_act": True}, "asym+shared", 4, 32, torch.float16,
                    gptq),
    "gptq-uneven": ("llama_gqa", GPTQ | {"desc_act": True}, "asym+uneven", 4, 32, torch.float16,
                    gptq),
    "gptq-v2": ("mistral_full", GPTQ | {"checkpoint_format": "gptq_v2"}, "asym0+order", 4, 32,
                torch.float16, partial(gptq, v1=False)),
    "gptq-no-index": ("llama_gqa", GPTQ | {"bits": 8}, "asym0", 8, 32, torch.float16,
                      partial(gptq, index=False)),
    "awq": ("qwen2_gqa", AWQ, "asym0", 4, 32, torch.float16, awq),
    "awq-row": ("llama_gqa", AWQ | {"group_size": -1, "version": "GEMM"}, "asym0", 4, -1,
                torch.float16, awq),
    "compressed": ("llama_gqa", packed(scheme(4)), "sym", 4, 32, torch.bfloat16,
                   partial(compressed, symmetric=True)),
    "compressed-8-channel": ("qwen3_gqa", packed(scheme(8, "channel")), "sym", 8, -1,
                             torch.float32, partial(compressed, symmetric=True)),
    "compressed-asym": ("llama_odd_packed", packed(scheme(4, symmetric=False)), "asym0", 4, -1,
                        torch.bfloat16, partial(compressed, symmetric=False)),
    "compressed-order": ("mistral_full", packed(scheme(4, actorder="group")), "asym0+order", 4, 32,
                         torch.float16, partial(compressed, symmetric=False, index=True)),
    # 48 columns a scale, and 16 or none left over: not two scales of 32 for rows of 64
    "compressed-short-group": ("llama_gqa", packed(scheme(4, group=48)), "sym", 4, 48,
                               torch.float16, partial(compressed, symmetric=True)),
    # as GPTQModel writes layers that `dynamic` gives other bits and groups
    "gptq-dynamic": ("llama_gqa", GPTQ | {"bits": 4, "group_size": 64, "dynamic":
                                          {"+:.*": {"bits": 8, "group_size": 32}}}, "asym0", 8, 32,
                     torch.float16, gptq),
    "compressed-preset": ("llama_gqa", {**packed(), "config_groups": {"W8A16": ["Linear"]}}, "sym",
                          8, 32, torch.float16, partial(compressed, symmetric=True)),
}  # fmt: skip
# rows and columns that fill no whole word
zoo.ZOO["llama_odd_packed"] = {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 10,
                               "intermediate_size": 92}  # fmt: skip


def made(case: str, tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Return the packed folder, one in float32 with the weights meant, and those."""
    name, settings, kind, bits, group, dtype, pack = CASES[case]

    def make(stem: str, shape: tuple[int, ...], seed: int) -> Any:
        drawn = draw(shape, bits, group, dtype, kind, seed)
        return drawn, pack(stem, drawn) if pack is awq else pack(stem, drawn, bits=bits)

    source = zoo.make(name, tmp_path)
    meant = convert(source, tmp_path / "packed", settings, make)
    return tmp_path / "packed", with_weights(source, tmp_path / "meant", meant), meant


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits(case: str, tmp_path: Path) -> None:
    path, folder, meant = made(case, tmp_path)
    source = open_source(path, CompileOptions.parse({"dtype": "float32"}))
    model = Decoder(ModelConfig.from_dict(CheckpointFolder.open(path).config)).eval()
    model.requires_grad_(False)
    for key, parameter in model.named_parameters():
        value = source.read(key).float()
        assert torch.equal(value.view(torch.int32), meant[key].view(torch.int32)), key
        parameter.copy_(value)
    ids = zoo.token_ids(folder)
    logits = model(torch.tensor(ids), torch.arange(len(ids)))
    assert (logits - zoo.reference_logits(folder, ids)).abs().max() <= zoo.TOLERANCE
    # by default in the dtype of config.json: what the formats' own code computes in it
    source = open_source(path, CompileOptions.parse({}))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(source.read(name), meant[name].to(torch.float16))
    assert any("gets float16" in note for note in source.notes)


def test_what_takes_more_memory_than_in_the_file_is_reported(tmp_path: Path) -> None:
    floats = ("gptq-uneven", "compressed-short-group")
    for case in (*floats, "gptq-order", "compressed-order", "gptq-asym"):
        expected = 14 if case in floats else 0
        source = open_source(made(case, tmp_path / case)[0], CompileOptions.parse({}))
        stored, notes = source.stored_forms(), source.expanded()
        assert len(stored) == 14 - expected and len(notes) == (expected > 0 or "order" in case)
        said = "kept in float16, " if expected else "kept sorted by group, in 14 different orders"
        assert all(said in n and n.startswith("14 quantised weights") for n in notes)


def test_pieces_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aios_compile.checkpoint.packed_weights.PIECE_WEIGHTS", 17 * 96)
    name = "model.layers.0.mlp.down_proj.weight"
    for case in ("gptq-order", "awq", "compressed-asym"):
        path, _, meant = made(case, tmp_path / case)
        weights = CheckpointFolder.open(path).weights
        pieces = [torch.from_numpy(piece) for _, piece in weights.pieces(name)]
        assert len(pieces) > 3 and torch.equal(torch.cat(pieces), meant[name])


@pytest.mark.parametrize(
    "case, form, matrices",
    [
        ("gptq-shared", "uint4_g32_f16_min_zero", 8),  # q, k, v are one matrix, gate and up another
        *nightly(
            ("awq", "uint4_g32_f16_min_zero", 8),
            ("gptq-order", "uint4_g32_bf16_min_zero", 14),  # each in an order of its own: all apart
            ("compressed-order", "uint4_g32_f16_min_zero", 14),
        ),
    ],
)
def test_compiled(
    case: str, form: str, matrices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_quickly(monkeypatch)
    monkeypatch.setenv("AIOS_VERIFY", "0")
    path, folder, meant = made(case, tmp_path)
    stored = load_file(path / "model.safetensors")
    orders = {
        f"{name.rpartition('.')[0]}.weight": torch.argsort(groups.long(), stable=True)
        for name, groups in stored.items()
        if name.endswith("g_idx")
    }
    ids = zoo.token_ids(folder)
    options: dict[str, Any] = {"dtype": "float32", "progress": False, "num_threads": 1}
    with aios_compile.load_and_compile(path, **options) as model:
        expected = zoo.reference_logits(folder, ids)
        assert (model(ids) - expected).abs().max() <= 0.02 * expected.abs().max()
        label = {"gptq": "GPTQ int4", "awq": "AWQ int4"}.get(case[:4].strip("-"), "compressed")
        assert any(label in note for note in model.report().notes)
        assert {w.packed.replace("_halves", "") for w in model.program.weights if w.packed} > {
            f"quant16.{form}"
        }
        assert any("sorted by group" in n for n in model.report().notes) == (case != "awq")
        in_order = meant | {name: meant[name][:, order] for name, order in orders.items()}
        assert check_stored(model, in_order) == 14  # 7 a layer
        codes = [w.name for w in model.program.weights if kind_of(w.packed) == "quant16"]
        assert len(codes) == matrices
        placed = [w for w in model.program.weights if w.recipe.endswith(":order']")]
        assert len(placed) == {"awq": 0, "gptq-shared": 4}.get(case, 14)  # inputs of 64 and of 96
        for entry in placed:
            name = entry.recipe.removeprefix("checkpoint['").removesuffix(":order']")
            assert torch.equal(torch.from_numpy(model._artefact.tensor(entry.name)), orders[name])
        taken = sum(model._artefact.tensors[w.name].num_bytes for w in placed)
        taken += sum(model._artefact.tensors[name].num_bytes for name in codes)
    parts = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale")
    parts += ("weight_zero_point", "weight_g_idx")
    held = sum(t.nbytes for name, t in stored.items() if name.rpartition(".")[2] in parts)
    assert 0.9 * held <= taken <= 1.1 * held


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "method 'bitsandbytes'"),
        ({"quant_method": "fp8"}, "method 'fp8'"),
        ({"quant_method": "exl2"}, "method 'exl2'"),
        ({"quant_method": "mxfp4"}, "method 'mxfp4'"),
        ({"quant_method": "torchao"}, "method 'torchao'"),
        ({}, "method None"),
        ("gptq4", "method 'gptq4'"),
        (GPTQ | {"bits": 3}, "weights of 3 bits"),
        (GPTQ | {"bits": True}, "weights of True bits"),
        (GPTQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "checkpoint_format 'marlin'"),
        (GPTQ | {"group_size": 16}, r"'\S+scales' is F16 \[3, 64\], expected .* \[6, 64"),
        (GPTQ | {"bits": 8}, r"'\S+scales' is F16"),
        (AWQ, r"'\S+qweight' has 12 inputs, no multiple of group_size 32"),
        (AWQ | {"version": "gemv"}, "AWQ version 'gemv'"),
        (AWQ | {"version": "marlin"}, "AWQ version 'marlin'"),
        (AWQ | {"bits": 8}, "AWQ of 8 bits"),
        (AWQ | {"zero_point": False}, "zero_point false"),
        (packed(scheme(4)), "says compressed-tensors, no tensor of the folder is packed so"),
        (packed(scheme(4), format="float-quantized"), "format 'float-quantized'"),
        (packed(scheme(4), format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (packed(scheme(4), quantization_status="frozen"), "quantization_status 'frozen'"),
        (packed(scheme(4), kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (packed(scheme(4), transform_config={"R1": 1}), "transform_config"),
        (packed(scheme(4), sparsity_config={"format": "sparse-bitmask"}), "'sparse-bitmask'"),
        (packed(scheme(4, input_activations={"num_bits": 8})), "quantised activations"),
        (packed(scheme(4, "tensor")), "strategy 'tensor'"),
        (packed(scheme(3)), "weights of 3 bits"),
        (packed(), "config_groups is {}"),
        ({**packed(), "config_groups": {"NVFP4": ["Linear"]}}, "the scheme"),
        ({**packed(), "config_groups": {"group_0": {}}}, "no weights in the group"),
    ],
)
def test_refused_by_name(settings: Any, reason: str, tmp_path: Path) -> None:
    path, _, _ = made("gptq", tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, UnsupportedModelError), match=reason) as caught:
        open_source(path, CompileOptions.parse({}))
    assert str(path) in str(caught.value)


STEM = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "case, change, reason",
    [
        ("gptq", lambda t: t.pop(f"{STEM}.qzeros"), "q_proj.qzeros' is missing"),
        ("gptq", lambda t: t.update({f"{STEM}.weight": torch.ones(2)}), "and packed too"),
        ("gptq", lambda t: t.update({f"{STEM}.qweight": torch.ones(8, 64)}), "expected I32"),
        ("gptq", lambda t: t.update({f"{STEM}.bias": torch.ones(64)}), "bias' is not part of"),
        ("gptq", lambda t: t.update({f"{STEM}.bias": torch.zeros(64)}), None),
        ("gptq", lambda t: t[f"{STEM}.g_idx"].fill_(2), "names groups from 2 to 2, there are 2"),
        ("gptq", lambda t: t[f"{STEM}.g_idx"].fill_(-1), "names groups from -1 to -1"),
        ("awq", lambda t: t.pop(f"{STEM}.scales"), "q_proj.scales' is missing"),
        ("compressed", lambda t: t[f"{STEM}.weight_shape"].fill_(64), None),
        ("compressed", lambda t: t[f"{STEM}.weight_shape"].fill_(-1), "says .-1, -1., which"),
        ("compressed", lambda t: t[f"{STEM}.weight_shape"].fill_(1 << 62), "cannot hold"),
        (
            "compressed-short-group",
            lambda t: t.update({f"{STEM}.weight_scale": torch.ones(64, 4).half()}),
            r"\[64, 64\] weights in 8 words a row with 4 scales fit none of .* in groups of 48\)",
        ),
    ],
)
def test_damaged_parts(case: str, change: Any, reason: str | None, tmp_path: Path) -> None:
    path, _, _ = made(case, tmp_path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")

    def read() -> None:
        open_source(path, CompileOptions.parse({})).read(f"{STEM}.weight")

    if reason is None:
        return read()
    with pytest.raises(CheckpointError, match=reason):
        read()


def test_flips_and_truncations(tmp_path: Path) -> None:
    """A damaged header: a typed error, or other tensors that still make a model."""
    zoo.ZOO["llama_tiny"] = {"num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 16,
                             "num_key_value_heads": 1, "hidden_size": 32, "vocab_size": 8,
                             "intermediate_size": 32}  # fmt: skip

    def make(stem: str, shape: tuple[int, ...], seed: int) -> Any:
        drawn = draw(shape, 4, 32, torch.float16, "asym", seed)
        return drawn, gptq(stem, drawn, 4)

    path = tmp_path / "packed"
    convert(zoo.make("llama_tiny", tmp_path), path, GPTQ, make)
    good = (path / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    assert end > 2048
    every = "NIGHTLY" in os.environ  # all of them there, some of them in `make test`
    cases = [good[:at] for at in range(0, end, 1 if every else 17)]
    for at in range(0, end, 1 if every else 3):
        flipped = bytearray(good)
        flipped[at] ^= 1 << (at % 7)
        cases.append(bytes(flipped))
    refused = hold(path / "model.safetensors", cases, lambda _: open_all(path))
    assert refused > 0.9 * len(cases)


def open_all(path: Path) -> None:
    source = open_source(path, CompileOptions.parse({}))
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        try:
            source.read(f"model.layers.0.{name}.weight")
        except KeyError as error:
            raise AiosError(str(error)) from None
