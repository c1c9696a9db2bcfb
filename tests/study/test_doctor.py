"""The doctor needs a config.json only; its counts are those of the program, and can be pinned."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aios_compile.cli.main import app
from aios_compile.config import CompileOptions
from aios_compile.errors import CheckpointError, ConfigError
from aios_compile.study import ablation, doctor
from aios_compile.study.doctor import Diagnosis, differences, examine, pinned
from tests.passes.helpers import decoder_config

LAYERS, KV_TOKEN = 2, 2 * 2 * 2 * 8 * 4  # layers x (k and v) x heads x width x float32


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = decoder_config("qwen3", torch_dtype="float32", **changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    folder = write(tmp_path_factory.mktemp("model"))
    return examine(str(folder), CompileOptions(), context=10, bandwidth=1e9)


def test_what_fused_and_what_nearly_did(found: Diagnosis) -> None:
    assert found.hits["merge_qkv"] == found.hits["fuse_add_rms_norm"] == 1 and not found.refused
    norm = [text for name, text in found.near_misses if name == "fuse_add_rms_norm"]
    assert any("summed outside of the layer" in t and "decoder.py:" in t for t in norm)
    assert "fuse_add_rms_norm: what it normalises" in str(found)


def test_bytes_and_memory_are_the_models(found: Diagnosis) -> None:
    hidden, inner, vocabulary, width = 32, 48, 101, 8
    layer = hidden * width * (4 + 2 + 2 + 4) + 3 * hidden * inner + 2 * hidden + 2 * width
    weights = 4 * (LAYERS * layer + vocabulary * hidden + hidden)  # the head, the last norm
    read = sum(row.weight_bytes for row in found.kernels)
    rope_and_row = read - weights  # the table of frequencies, one row of the embedding
    assert 0 < rope_and_row <= 4 * (hidden + width)
    assert sum(row.kv_bytes for row in found.kernels) == KV_TOKEN * (10 + 1)
    assert found.memory is not None and found.memory.kv_token == KV_TOKEN
    assert found.tokens_per_second == pytest.approx(1e9 / found.floor_bytes)
    assert sum(row.launches for row in found.kernels) == found.launches


def test_twice_the_tokens_need_a_larger_arena_only(found: Diagnosis) -> None:
    now, doubled = found.memory, found.memory_doubled
    assert now is not None and doubled is not None and doubled.tokens == 2 * now.tokens
    assert 1.5 * now.arena < doubled.arena <= 2 * now.arena
    assert (now.weights, now.kv_full) == (doubled.weights, doubled.kv_full)


def test_counts_can_be_pinned(found: Diagnosis) -> None:
    counts = pinned(found)
    assert differences(found, counts) == [] and differences(found, {"merge_qkv": 1}) == []
    assert differences(found, {**counts, "merge_qkv": 3}) == ["merge_qkv: 1, expected 3"]
    with pytest.raises(ConfigError, match="no count of the doctor"):
        differences(found, {"merge_kqv": 1})


def test_what_is_refused_is_told_and_fails(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", hidden_act="swish9")
    with pytest.raises(Exception, match="swish9"):
        examine(str(folder), CompileOptions(), bandwidth=1e9)
    with pytest.raises(CheckpointError):
        examine(str(tmp_path / "nothing"), CompileOptions(local_files_only=True), bandwidth=1e9)


def test_the_command_pins_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = functools.partial(ablation.ablate, only=("merge_qkv",))
    monkeypatch.setattr(doctor, "ablate", few)  # each pass takes half a second
    monkeypatch.setattr(doctor, "examine", functools.cache(doctor.examine))  # both commands'
    model, pins = str(write(tmp_path / "m")), tmp_path / "pins.json"
    common = ["doctor", model, "--bandwidth", "20"]
    first = CliRunner().invoke(app, [*common, "--pin", str(pins), "--savings", "--json"])
    assert first.exit_code == 0, first.output
    shown = json.loads(first.stdout)
    assert shown["kernels"][0]["bytes_a_token"] >= shown["kernels"][1]["bytes_a_token"]
    assert shown["predicted_tokens_per_second"] > 0 and shown["differences"] == []
    saved = shown["savings"]
    assert set(saved["without"]) == {"merge_qkv"}
    assert saved["without"]["merge_qkv"]["launches"] > saved["everything"]["launches"]
    pins.write_text(json.dumps({"merge_qkv": 1, "raise_rope": 7}))
    second = CliRunner().invoke(app, [*common, "--expect", str(pins)])
    assert second.exit_code == 1 and "DIFFERS: raise_rope: 2, expected 7" in second.stdout
