"""A zoo of tiny models: config.json by name, seeded weights, and transformers' answers.

Weights are drawn so that every component matters: leaving out RoPE, a norm, a window or a bias
moves some logit by at least 1e-2, a hundred times the tolerance of 1e-4 (tests/test_models_zoo.py
checks).

    path = zoo.make("qwen3_window", tmp_path, "float32")
    logits = zoo.reference_logits(path, ids)             float32 [T, vocab]
"""

from __future__ import annotations

import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from aios_compile.checkpoint.folder import CheckpointFolder
from aios_compile.models.config import FAMILIES, ModelConfig
from aios_compile.models.decoder import Decoder
from aios_compile.models.parameters import parameter_shapes, tied_parameters

TOLERANCE = 1e-4
NUM_TOKENS = 48  # crosses windows, trained lengths and pages of 16 and 32 tokens

_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_DYNAMIC = {"max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 3.0}}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def _rope(**parameters: Any) -> dict[str, Any]:
    """Return the new style of RoPE configuration."""
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


# name -> what differs from _SMALL; the part before the first underscore is the model type
ZOO: dict[str, dict[str, Any]] = {
    "llama_mha": {"num_key_value_heads": 4},
    "llama_gqa": {},
    "llama_mqa": {"num_key_value_heads": 1},
    "llama_tied": {"tie_word_embeddings": True},
    "llama_attention_bias": {"attention_bias": True},
    "llama_mlp_bias": {"mlp_bias": True},
    "llama_head_dim": {"head_dim": 32},
    "llama_odd_sizes": {"vocab_size": 131, "intermediate_size": 100, "hidden_size": 60,
                        "num_attention_heads": 6, "head_dim": 10},
    "llama_theta": {"rope_theta": 500.0},
    "llama_epsilon": {"rms_norm_eps": 0.05},
    "llama_gelu": {"hidden_act": "gelu"},
    "llama_gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "llama_relu": {"hidden_act": "relu"},
    "llama_linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_linear_new": _rope(rope_type="linear", factor=2.5),
    "llama_llama3": _rope(**_LLAMA3),
    "llama_llama3_old": {"rope_theta": 500000.0, "rope_scaling": _LLAMA3},
    "llama_yarn": _rope(**_YARN),
    "llama_dynamic": _DYNAMIC,
    "llama_partial_rotary": _rope(partial_rotary_factor=0.5),
    "mistral_full": {"sliding_window": None},
    "mistral_window": {"sliding_window": 7},
    "mistral_window_page": {"sliding_window": 16, "num_key_value_heads": 1},
    "mistral_head_dim": {"sliding_window": None, "head_dim": 24},
    "mistral_yarn": {"sliding_window": 33, **_rope(**_YARN, attention_factor=1.3)},
    "qwen2_gqa": {},
    "qwen2_tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2_window_layers": {"num_hidden_layers": 3, "use_sliding_window": True,
                            "sliding_window": 9, "max_window_layers": 1},
    "qwen2_layer_types": {"num_hidden_layers": 3, "use_sliding_window": True,
                          "sliding_window": 17, "layer_types": _MIXED},
    "qwen2_window_off": {"use_sliding_window": False, "sliding_window": 4},
    "qwen2_yarn": {"rope_scaling": {**_YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
    "qwen2_dynamic": {**_DYNAMIC, "rope_theta": 1000.0},
    "qwen3_gqa": {"head_dim": 16},
    "qwen3_tied": {"head_dim": 32, "tie_word_embeddings": True},
    "qwen3_bias": {"head_dim": 16, "attention_bias": True},
    "qwen3_window": {"head_dim": 16, "num_hidden_layers": 3, "use_sliding_window": True,
                     "sliding_window": 5, "max_window_layers": 2},
    "qwen3_layer_types": {"head_dim": 16, "num_hidden_layers": 3, "use_sliding_window": True,
                          "sliding_window": 16, "layer_types": _MIXED},
    "qwen3_yarn_mscale": {"head_dim": 16, **_rope(**_YARN, mscale=0.7, mscale_all_dim=1.1,
                                                  truncate=False)},
    "qwen3_dynamic": {"head_dim": 32, **_DYNAMIC},
    "qwen3_mqa": {"head_dim": 48, "num_key_value_heads": 1},
}  # fmt: skip


def config_of(name: str, dtype: str = "float32") -> dict[str, Any]:
    """Return the config.json of a zoo model."""
    model_type = name.split("_")[0]
    head = {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture]}
    return {**head, **_SMALL, "torch_dtype": dtype, **ZOO[name]}


def make(name: str, folder: Path, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a Hugging Face folder of the model below `folder` and return its path."""
    path = Path(folder) / f"{name}_{dtype}_{seed}"
    if (path / "model.safetensors").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    values = config_of(name, dtype)
    config = ModelConfig.from_dict(values)
    (path / "config.json").write_text(json.dumps(values, indent=2))
    tensors = {
        key: torch.from_numpy(_draw(key, shape, zlib.crc32(f"{seed}/{name}/{key}".encode())))
        for key, shape in parameter_shapes(config).items()
        if key not in tied_parameters(config)
    }
    kind = getattr(torch, dtype)
    save_file({key: t.to(kind) for key, t in tensors.items()}, str(path / "model.safetensors"))
    return path


def _draw(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    if key.endswith("norm.weight"):
        values = generator.uniform(0.5, 1.5, shape)
    elif key.endswith(".bias"):
        values = generator.normal(0, 0.5, shape)
    elif key.endswith("embed_tokens.weight"):
        values = generator.normal(0, 1, shape)
    else:
        gain = 1.3 if "q_proj" in key or "k_proj" in key else 1.0
        values = generator.normal(0, gain / np.sqrt(shape[1]), shape)
    return values.astype(np.float32)


def token_ids(path: Path, num_tokens: int = NUM_TOKENS, seed: int = 0) -> list[int]:
    """Return seeded token ids that the model's vocabulary holds."""
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(seed).integers(0, vocab_size, num_tokens).tolist()


def decoder(path: Path, dtype: str = "float32") -> Decoder:
    """Load our eager decoder from a folder, in `dtype`."""
    folder = CheckpointFolder.open(path)
    config = ModelConfig.from_dict(folder.config)
    folder.weights.check(parameter_shapes(config), tied_parameters(config))
    model = Decoder(config).to(getattr(torch, dtype)).eval()
    for key, parameter in model.named_parameters():
        array = folder.weights.read(key)
        value = torch.from_numpy(array.copy())
        if folder.weights.info(key).dtype == "BF16":
            value = value.view(torch.bfloat16)
        parameter.data.copy_(value)
    return model.requires_grad_(False)


@lru_cache(maxsize=4)
def reference_model(path: Path, dtype: str = "float32") -> torch.nn.Module:
    """Load a folder with transformers, with spelled-out attention."""
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    values = json.loads((path / "config.json").read_text())
    if "partial_rotary_factor" in (values.get("rope_parameters") or {}):
        return _phi3(path, values).to(kind).eval()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, attn_implementation="eager")
    return model.eval()


def _phi3(path: Path, values: dict[str, Any]) -> torch.nn.Module:
    """Return Phi-3 with the folder's weights: a Llama with partial rotary positions.

    transformers' own Llama ignores the factor for the default RoPE type.
    """
    from safetensors.torch import load_file
    from transformers import Phi3Config, Phi3ForCausalLM

    shared = {k: v for k, v in values.items() if k not in ("model_type", "architectures")}
    config = Phi3Config(**shared, pad_token_id=None, sliding_window=None)
    config._attn_implementation = "eager"
    model = Phi3ForCausalLM(config)
    state = load_file(path / "model.safetensors")
    for i in range(config.num_hidden_layers):
        for merged, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            pieces = [state.pop(f"model.layers.{i}.{part}.weight") for part in parts]
            state[f"model.layers.{i}.{merged}.weight"] = torch.cat(pieces)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def reference_logits(path: Path, ids: list[int], dtype: str = "float32") -> torch.Tensor:
    """Return transformers' logits of one sequence from position 0, float32 [T, vocab]."""
    logits: torch.Tensor = reference_model(path, dtype)(torch.tensor([ids])).logits[0]
    return logits.float()


def reference_greedy(path: Path, ids: list[int], num_tokens: int) -> list[int]:
    """Return the next `num_tokens` greedy tokens by transformers, without a cache."""
    tokens = list(ids)
    for _ in range(num_tokens):
        tokens.append(int(reference_logits(path, tokens)[-1].argmax()))
    return tokens[len(ids) :]


__all__ = ["TOLERANCE", "ZOO", "config_of", "decoder", "make", "reference_greedy",
           "reference_logits", "reference_model", "token_ids"]  # fmt: skip
