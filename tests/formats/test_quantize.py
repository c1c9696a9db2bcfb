"""`aios quantize`: beats rounding to nearest on held-out text; the folder; what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from typer.testing import CliRunner

from aios_compile.checkpoint.folder import CheckpointFolder
from aios_compile.checkpoint.tokenizer import Tokenizer
from aios_compile.cli.main import app
from aios_compile.errors import CheckpointError, ConfigError
from aios_compile.models.config import ModelConfig
from aios_compile.models.decoder import Decoder
from aios_compile.quantize.awq import scale_channels
from aios_compile.quantize.calibration import HiddenStates, load_layer, windows_of
from aios_compile.quantize.gptq import gptq, output_error
from aios_compile.quantize.quantize_checkpoint import quantize_checkpoint
from aios_compile.quantize.scheme import Scheme, round_to_nearest
from tests import zoo

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAKESPEARE = EXAMPLES / "shakespeare"
WINDOW = 512


@pytest.fixture(scope="module")
def texts() -> tuple[str, list[int]]:
    """Text that the example was trained on, and tokens of text that training never saw."""
    text = (EXAMPLES / "tinyshakespeare.txt").read_text()
    seen, held = text[: len(text) // 8], text[len(text) - len(text) // 20 :]
    return seen, Tokenizer.load(SHAKESPEARE).encode(held)[: 8 * WINDOW]


def decoder(path: Path) -> Decoder:
    """The reference decoder with the weights of a folder, packed ones as they mean."""
    from aios_compile.config import CompileOptions
    from aios_compile.model_source import open_source

    source = open_source(path, CompileOptions(dtype="float32", local_files_only=True))
    model = Decoder(ModelConfig.from_dict(CheckpointFolder.open(path).config, str(path)))
    for name, parameter in model.named_parameters():
        parameter.data = source.read(name).float()
    return model.requires_grad_(False)


def perplexity(model: Decoder, ids: list[int]) -> float:
    windows = torch.tensor(ids).reshape(-1, WINDOW)
    logits = model(windows, torch.arange(WINDOW).expand_as(windows))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return math.exp(float(loss))


def rounded(scheme: Scheme) -> Decoder:
    """What a load with quantization= does: to nearest, by plain error; the head stays as well."""
    model = decoder(SHAKESPEARE)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            equal = torch.ones(parameter.shape[1])
            parameter.data = round_to_nearest(parameter.data, equal, scheme).values()
    return model


@pytest.mark.nightly
def test_gptq_and_awq_beat_rounding_to_nearest(texts: Any, tmp_path: Path) -> None:
    """INT4, groups of 32, held-out perplexity, all of the text and 32 windows to calibrate on: to
    nearest +0.53 %, AWQ +0.35 %, GPTQ +0.15 %. Here on some of it."""
    text, held = texts
    scheme = Scheme(scales=torch.bfloat16)
    plain, nearest = perplexity(decoder(SHAKESPEARE), held), perplexity(rounded(scheme), held)
    out, cache = tmp_path / "gptq", str(tmp_path)
    report = quantize_checkpoint(SHAKESPEARE, out, text, samples=8, cache_dir=cache)
    assert report.bits == pytest.approx((4.5 * 4718592 + 16 * 262144) / 4980736, rel=1e-3)
    assert len(report.matrices) == 7 * 6 and report.kept[0][0] == "lm_head"
    change = [value / plain - 1 for value in (nearest, perplexity(decoder(out), held))]
    print(f"to nearest {change[0]:+.3%}, GPTQ {change[1]:+.3%}")
    assert change[1] < 0.6 * change[0]
    assert all(row.error <= row.error_to_nearest for row in report.matrices)
    out = tmp_path / "awq"
    report = quantize_checkpoint(SHAKESPEARE, out, text, method="awq", samples=2, cache_dir=cache)
    lost = [sum(x) for x in zip(*((row.error, row.error_to_nearest) for row in report.matrices))]
    print(f"mean error of outputs: to nearest {lost[1] / 42:.2%}, AWQ {lost[0] / 42:.2%}")
    assert lost[0] < lost[1]
    row = report.matrices[0]
    again = quantize_checkpoint(
        SHAKESPEARE, tmp_path / "awq", text, method="awq", samples=2, cache_dir=str(tmp_path)
    )
    assert again.cached and again.matrices[0] == row
    with pytest.raises(CheckpointError, match="is there already"):
        quantize_checkpoint(SHAKESPEARE, tmp_path / "awq", text, cache_dir=str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} >= {"gptq", "awq"}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "staging is gone"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_compensation_is_the_paper_s(bits: int, group: int, symmetric: bool) -> None:
    """Against the algorithm written naively: one row at a time, the inverse updated by elimination.

    On inputs that depend on each other it loses less than rounding to nearest.
    """
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(64, 64, generator=generator)
    x = torch.randn(500, 64, generator=generator) @ mixed
    hessian = (x.T @ x).double() / len(x)
    weight = torch.randn(5, 64, generator=generator)
    scheme = Scheme(bits, group, symmetric)
    found = gptq(weight, hessian, scheme)
    wanted = naive(weight.double(), hessian, found, scheme)
    assert torch.equal(found.codes.long(), wanted)
    plain = round_to_nearest(weight, hessian.diagonal().float(), scheme)
    losses = [output_error(weight, q.values(), hessian) for q in (found, plain)]
    assert losses[0] < 0.9 * losses[1]
    direct = ((found.values() - weight) @ x.T).norm() / (weight @ x.T).norm()
    assert losses[0] == pytest.approx(float(direct), rel=1e-4)


def naive(weight: torch.Tensor, hessian: torch.Tensor, grid: Any, scheme: Scheme) -> torch.Tensor:
    """OBQ in column order (equations 2 and 3 of the paper), on the grid that was found."""
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    codes = torch.empty(weight.shape, dtype=torch.int64)
    for row in range(len(weight)):
        w, inverse = weight[row].clone(), damped.inverse()
        for k in range(64):
            scale = float(grid.scales[row, k // scheme.group])
            zero = int(grid.zeros[row, k // scheme.group])
            code = round(float(w[k]) / scale) + zero
            codes[row, k] = min(max(code, 0), scheme.top)
            off = (w[k] - (codes[row, k] - zero) * scale) / inverse[k, k]
            w -= off * inverse[:, k]
            inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes


def test_scaling_channels_keeps_the_function(zoo_model: Path) -> None:
    config = ModelConfig.from_dict(CheckpointFolder.open(zoo_model).config, "")
    tensors = load_file(zoo_model / "model.safetensors")
    layer = load_layer(config, 0, lambda name: tensors[name].clone())
    ids = torch.arange(300) % 120
    states = HiddenStates(config, windows_of(ids.tolist(), 50, 6), tensors[EMBED])
    hessians = states.hessians(layer)
    assert hessians["self_attn.q_proj"] is hessians["self_attn.v_proj"]
    x = torch.randn(1, 9, config.hidden_size)
    tables = [t[:9] for t in states._tables]
    before = layer(x, *tables, torch.arange(9))
    old = layer.self_attn.q_proj.weight.clone()
    scale_channels(layer, hessians, Scheme(group=32), torch.bfloat16)
    assert not torch.equal(old, layer.self_attn.q_proj.weight)
    torch.testing.assert_close(layer(x, *tables, torch.arange(9)), before, rtol=1e-4, atol=1e-5)
    fresh = states.hessians(layer)
    for name in ("self_attn.q_proj", "mlp.down_proj", "self_attn.o_proj"):
        torch.testing.assert_close(fresh[name], hessians[name], rtol=1e-3, atol=1e-6)


EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def zoo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.make("llama_mha", tmp_path_factory.mktemp("zoo"), "float32")


@pytest.mark.parametrize(("bits", "asymmetric"), [(4, True), (8, False)])
def test_the_tensors_mean_what_the_format_says(
    bits: int, asymmetric: bool, zoo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpacked with the format's definition, and as our reader gives them."""
    monkeypatch.setattr(CheckpointFolder, "has_tokenizer", lambda self: True)
    monkeypatch.setattr(CheckpointFolder, "load_tokenizer", lambda self: _Letters())
    scheme = Scheme(bits, 32, not asymmetric)
    out = tmp_path / "out"
    report = quantize_checkpoint(
        zoo_model, out, "some text " * 60, scheme=scheme, cache_dir=str(tmp_path)
    )
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (bits, 32)
    assert weights["symmetric"] is not asymmetric and config["ignore"] == ["lm_head"]
    assert max(row.error for row in report.matrices) < (0.2 if bits == 4 else 0.02)
    tensors, read = load_file(out / "model.safetensors"), CheckpointFolder.open(out).weights
    stem = "model.layers.1.mlp.down_proj"
    rows, depth = tensors[f"{stem}.weight_shape"].tolist()
    words = tensors[f"{stem}.weight_packed"].numpy().view(np.uint32)
    count = 32 // bits
    codes = np.stack([words >> (bits * i) & ((1 << bits) - 1) for i in range(count)], -1)
    codes = codes.reshape(rows, -1)[:, :depth].astype(np.int64)
    zeros = np.full((rows, depth // 32), 1 << (bits - 1))
    if asymmetric:
        packed = tensors[f"{stem}.weight_zero_point"].numpy().view(np.uint32)
        parts = [packed >> (bits * i) & ((1 << bits) - 1) for i in range(count)]
        zeros = np.stack(parts, 1).reshape(-1, packed.shape[1])[:rows].astype(np.int64)
    scales = tensors[f"{stem}.weight_scale"].float().numpy()
    meant = (codes - zeros.repeat(32, 1)) * scales.repeat(32, 1)
    np.testing.assert_array_equal(read.read(f"{stem}.weight"), meant.astype(np.float32))
    assert read.stored_form(f"{stem}.weight")
    source = load_file(zoo_model / "model.safetensors")
    assert torch.equal(tensors[EMBED], source[EMBED])


class _Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) % 128 for c in text]


def test_what_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("To be, or not to be")
    run, out = CliRunner().invoke, str(tmp_path / "out")
    good = ["quantize", str(SHAKESPEARE), out, "--calibrate", str(text)]
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in SHAKESPEARE.iterdir():
        (packed / path.name).write_bytes(path.read_bytes())
    config = json.loads((packed / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    cases = {
        "no calibration text": ["quantize", str(SHAKESPEARE), out],
        "No such file": [*good[:4], "nowhere.txt"],
        "expected 128 or more": good,
        "group=48 is out of range": [*good, "--group", "48"],
        "bits=3 is out of range": [*good, "--bits", "3"],
        "method='rtn', expected gptq or awq": [*good, "--method", "rtn"],
        "samples=0": [*good, "--samples", "0"],
        "neither a folder nor a hub id": ["quantize", str(text), out, "--calibrate", str(text)],
    }
    for said, arguments in cases.items():
        result = run(app, arguments)
        assert result.exit_code == 1 and said in result.output, (said, result.output)
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize_checkpoint(packed, tmp_path / "out", "text", cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="no multiple of 128 in every layer"):
        path = zoo.make("llama_odd_sizes", tmp_path, "float32")
        (path / "tokenizer.json").write_bytes((SHAKESPEARE / "tokenizer.json").read_bytes())
        words = "To be, or not to be. " * 100
        wide = Scheme(group=128)
        quantize_checkpoint(path, tmp_path / "out", words, scheme=wide, cache_dir=str(tmp_path))
    assert not (tmp_path / "out").exists()
