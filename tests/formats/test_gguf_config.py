"""GGUF metadata: what changes the mathematics is honoured or refused by its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from aios_compile.checkpoint.gguf import GgufCheckpoint
from aios_compile.codegen.pack_weights import to_numpy
from aios_compile.codegen.packing import check_finite
from aios_compile.config import CompileOptions
from aios_compile.errors import CheckpointError, UnsupportedModelError
from aios_compile.model_source import open_source
from tests import zoo
from tests.formats.gguf_files import convert

REFUSED = (CheckpointError, UnsupportedModelError)
Change = Any


def made(tmp_path: Path, name: str = "qwen3_gqa", **values: Any) -> Path:
    """Write a model's file with more metadata; double underscores stand for dots."""

    def finish(writer: gguf.GGUFWriter) -> None:
        for key, value in values.items():
            key = key.replace("__", ".")
            key = key if key.startswith(("general.", "split.")) else f"{writer.arch}.{key}"
            writer.kv_data[0].pop(key, None)
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            else:
                (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)

    path = tmp_path / "model.gguf"
    convert(zoo.make(name, tmp_path), path, lambda _: Kind.F32, finish)
    return path


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"expert_count": 8}, "qwen3.expert_count = 8 is not implemented"),
        ({"attention__causal": False}, "attention.causal = False"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"attention__scale": 0.5}, "attention.scale = 0.5"),
        ({"logit_scale": 0.25}, "logit_scale = 0.25"),
        ({"attention__sliding_window": 9}, "attention.sliding_window = 9"),
        ({"attention__value_length": 8}, "value_length differs from key_length"),
        ({"rope__dimension_sections": [1, 2, 3, 0]}, "rope.dimension_sections differs"),
        ({"rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier = 0.1"),
        ({"rope__scaling__type": "longrope"}, "rope.scaling.type 'longrope'"),
        ({"a_key_from_tomorrow": 3}, "qwen3.a_key_from_tomorrow = 3"),
        ({"attention__head_count_kv": [2, 1]}, "head_count_kv differs from layer to layer"),
        ({"block_count": 0}, "qwen3.block_count is 0"),
        ({"block_count": "two"}, "qwen3.block_count is 'two'"),
        ({"vocab_size": 127}, "vocab_size is 127.*'token_embd.weight' has 128 rows"),
        ({"general__architecture": "gemma3"}, "'gemma3' is not implemented, known: llama, qwen2"),
        ({"general__type": "adapter"}, "holds 'adapter', expected a model"),
        ({"split__count": 3}, "one of 3 parts"),
        ({"block_count": 3}, r"'model.layers.2.\S+' is missing"),
        ({"block_count": 1}, r"'model.layers.1.\S+' is not part of this model"),
        ({"feed_forward_length": 95}, r"shape \[96, 64\], expected \[95, 64\]"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
    ],
)
def test_refused_by_name(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = made(tmp_path, **values)
    with pytest.raises(REFUSED, match=reason) as caught:
        open_source(path, CompileOptions.parse({}))
    assert "model.gguf" in str(caught.value)


def test_llama_rotates_whole_heads(tmp_path: Path) -> None:
    path = made(tmp_path, "llama_gqa", rope__dimension_count=8)
    with pytest.raises(CheckpointError, match="dimension_count is 8, expected 16"):
        GgufCheckpoint.open(path)


def test_neutral_values_pass(tmp_path: Path) -> None:
    path = made(
        tmp_path, expert_count=0, attention__causal=True, logit_scale=0.0,
        rope__scaling__type="none", rope__scaling__factor=8.0, attention__head_count_kv=[2, 2],
        general__sampling__top_k=20, general__sampling__temp=0.6,
    )  # fmt: skip
    checkpoint = GgufCheckpoint.open(path)
    assert checkpoint.config["num_key_value_heads"] == 2 and "rope_scaling" not in checkpoint.config
    assert checkpoint.generation_config == {"do_sample": True, "temperature": 0.6, "top_k": 20}


def test_partial_rotary_of_qwen(tmp_path: Path) -> None:
    source = open_source(made(tmp_path, rope__dimension_count=8), CompileOptions.parse({}))
    assert source.build().config.rope.rotary_dim == 8


def test_rotary_factors_are_read_or_refused(tmp_path: Path) -> None:
    """llama.cpp reads them for llama; left out in silence, every position would be wrong."""

    def finish(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32))

    path = tmp_path / "model.gguf"
    convert(zoo.make("qwen3_gqa", tmp_path), path, lambda _: Kind.F32, finish)
    with pytest.raises(REFUSED, match=r"rope_freqs\) are not implemented for qwen3"):
        GgufCheckpoint.open(path)


def test_scale_of_infinity_is_found(tmp_path: Path) -> None:
    """R19: an infinite scale reaches the check that every packed weight passes."""
    path = tmp_path / "model.gguf"
    convert(zoo.make("qwen3_gqa", tmp_path), path, lambda _: Kind.Q8_0)
    name = "model.layers.1.mlp.down_proj.weight"
    info = GgufCheckpoint.open(path).weights.info(name)
    with path.open("r+b") as file:
        file.seek(info.begin + 34 * 5)
        file.write(np.float16(np.inf).tobytes())
    value = open_source(path, CompileOptions.parse({})).read(name)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj"):
        check_finite(to_numpy(value), name)
