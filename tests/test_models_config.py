"""config.json: honoured, ignored with a list, or refused by name. And without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from aios_compile.errors import AiosError, CheckpointError, UnsupportedModelError
from aios_compile.models.config import ModelConfig
from tests import zoo


def read(name: str = "llama_gqa", /, **changes: Any) -> ModelConfig:
    values = {**zoo.config_of(name), **changes}
    return ModelConfig.from_dict({k: v for k, v in values.items() if v != "absent"})


UNSUPPORTED = [
    ({"model_type": "gemma2", "architectures": None}, "gemma2"),
    ({"model_type": None, "architectures": None}, "model_type"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"hidden_act": "xielu"}, "xielu"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
    ({"rope_parameters": {"rope_type": "axial"}}, "axial"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"logit_scale": 0.5}, "logit_scale"),
    ({"residual_multiplier": 0.2}, "residual_multiplier"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"attention_multiplier": 0.1}, "attention_multiplier"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling.X"}}, "auto_map"),
    ({"num_experts": 8}, "num_experts"),
    ({"dual_chunk_attention_config": {"chunk_size": 4}}, "dual_chunk_attention_config"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ({"sliding_window": 8, "use_sliding_window": True}, "sliding_window"),
    ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
]
IMPOSSIBLE = [
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -64}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": "absent"}, "hidden_size"),
    ({"hidden_size": 1 << 40}, "hidden_size"),
    ({"hidden_size": 66}, "hidden_size"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"head_dim": 7}, "head_dim"),
    ({"vocab_size": 0}, "vocab_size"),
    ({"vocab_size": 1e3}, "vocab_size"),
    ({"eos_token_id": 128}, "eos_token_id"),
    ({"eos_token_id": [5, -1]}, "eos_token_id"),
    ({"bos_token_id": "x"}, "bos_token_id"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_scaling": [1]}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.01}}, "partial_rotary_factor"),
    ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"architectures": ["Qwen3ForCausalLM"]}, "architectures"),
]


@pytest.mark.parametrize("changes, named", UNSUPPORTED)
def test_other_mathematics_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read(**changes)


@pytest.mark.parametrize("changes, named", IMPOSSIBLE)
def test_impossible_values_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(**changes)


def test_families_refuse_what_they_do_not_read() -> None:
    with pytest.raises(UnsupportedModelError, match="attention_bias"):
        read("mistral_full", attention_bias=True)
    with pytest.raises(UnsupportedModelError, match="sliding_window"):
        read("mistral_window", layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(CheckpointError, match="sliding_window"):
        read("qwen2_layer_types", use_sliding_window=False)


def test_defaults_are_those_of_transformers() -> None:
    assert read("mistral_full", sliding_window="absent").windows == (4096, 4096)
    assert read("mistral_full", num_key_value_heads="absent", num_attention_heads=8)
    assert read(num_key_value_heads="absent").num_key_value_heads == 4
    assert read("qwen3_gqa", head_dim="absent").head_dim == 128
    assert read(model_type="absent").model_type == "llama"
    assert read(pad_token_id=-1).pad_token_id is None
    assert read(eos_token_id=[3, 4]).eos_token_ids == (3, 4)


def test_unknown_keys_are_listed() -> None:
    config = read(my_note=1, rope_scaling={"type": "linear", "factor": 2.0, "finetuned": True})
    assert config.ignored_keys == ("my_note", "rope_parameters.finetuned")
    assert all(not read(name).ignored_keys for name in zoo.ZOO)


def test_neutral_values_are_accepted() -> None:
    assert read(quantization_config=None, num_experts=0, logit_scale=1.0, no_rope_layers=[])


def test_every_error_is_typed() -> None:
    bad = (None, -1, 10**30, "x", [], [[]], {}, {"a": 1}, True, 1e308, float("inf"))
    for name in ("qwen3_yarn_mscale", "llama_llama3", "qwen2_layer_types"):
        values = zoo.config_of(name)
        rope = values.get("rope_parameters", {})
        changed = [{**values, key: value} for key in values for value in bad]
        changed += [
            {**values, "rope_parameters": {**rope, key: value}} for key in rope for value in bad
        ]
        for one in changed:
            try:
                ModelConfig.from_dict(one)
            except AiosError as error:
                assert "config.json" in str(error)


def test_config_and_checkpoint_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import aios_compile.models.config, aios_compile.models.parameters\n"
        "import aios_compile.checkpoint.folder, aios_compile.checkpoint.hub\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
