"""Translate GGUF metadata to the fields of a config.json; models/config.py then checks both.

Every key of the architecture is honoured, known to change nothing, or refused by name. What the
keys mean is what llama.cpp does with them (src/llama-model.cpp, llama-hparams): rotary scaling is
linear unless `rope.scaling.type` says otherwise; Llama 3's frequencies come as a tensor of factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.checkpoint.gguf_header import GgufHeader
from aios_compile.checkpoint.gguf_names import EMBEDDING, HEAD, has_bias
from aios_compile.errors import CheckpointError, UnsupportedModelError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Keys (after the architecture's name) that change the mathematics and are not implemented, with the
# values that change nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
HARMLESS = ("rope.scaling.finetuned", "tensor_data_layout")
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


class _Keys:
    """The keys of one architecture; keeps account of what was read."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.where = str(header.path)
        self.prefix = architecture + "."
        self.values = {
            key.removeprefix(self.prefix): value
            for key, value in header.metadata.items()
            if key.startswith(self.prefix)
        }
        self.read: set[str] = set()

    def get(self, key: str) -> Any:
        """Return a number, bool or text; None where the key is absent.

        An array with one entry a layer counts where all layers agree. A float32 becomes the
        shortest decimal that rounds to it: 1e-05 and not 9.99999974738e-06.
        """
        self.read.add(key)
        value = self.values.get(key)
        if isinstance(value, np.ndarray):
            if len(value) == 0 or np.any(value != value[0]):
                raise UnsupportedModelError(
                    f"{self.where}: {self.prefix}{key} differs from layer to layer, which is not "
                    "implemented"
                )
            value = value[0].item()
        if isinstance(value, float) and math.isfinite(value) and abs(value) < 3e38:
            return float(str(np.float32(value)))
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 1 on; without a default the key must be there."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise CheckpointError(
                f"{self.where}: {self.prefix}{key} is "
                f"{'missing' if value is None else repr(value)[:40]}, expected a number from 1 on"
            )
        return value

    def refuse_the_rest(self) -> None:
        for key in sorted(self.values.keys() - self.read - set(HARMLESS)):
            value = self.get(key)
            if key not in NEUTRAL or value not in NEUTRAL[key]:
                raise UnsupportedModelError(
                    f"{self.where}: {self.prefix}{key} = {repr(value)[:80]} is not implemented"
                )


def config_of(header: GgufHeader) -> dict[str, Any]:
    """Return what config.json would say. Raises CheckpointError or UnsupportedModelError."""
    architecture = _architecture(header)
    keys = _Keys(header, architecture)
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path}: no tensor {EMBEDDING!r} of two dimensions")
    vocab_size = embedding.shape[0]
    said = keys.get("vocab_size")
    if said not in (None, vocab_size):
        raise CheckpointError(
            f"{header.path}: {architecture}.vocab_size is {repr(said)[:40]}, tensor {EMBEDDING!r} "
            f"has {vocab_size} rows"
        )
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > vocab_size:
        raise CheckpointError(
            f"{header.path}: {len(tokens)} tokens, tensor {EMBEDDING!r} has {vocab_size} rows"
        )
    window = keys.get("attention.sliding_window")
    model_type = "mistral" if architecture == "llama" and window else architecture
    heads, hidden = keys.size("attention.head_count"), keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", hidden // heads)
    if keys.get("attention.value_length") not in (None, head_dim):
        raise UnsupportedModelError(
            f"{header.path}: {architecture}.attention.value_length differs from key_length, which "
            "is not implemented"
        )
    config = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in header.tensors,
        **_special_ids(header),
        **_rotary(header, keys, architecture, head_dim),
        **_biases(header, model_type),
    }
    if model_type == "mistral":
        config["sliding_window"] = window or None
    elif window:
        raise UnsupportedModelError(
            f"{header.path}: {architecture}.attention.sliding_window = {window} is not implemented "
            f"for {architecture}"
        )
    keys.refuse_the_rest()
    return config


def generation_config_of(header: GgufHeader) -> dict[str, Any]:
    """Return the sampling defaults that the file recommends (general.sampling.*)."""
    found: dict[str, Any] = {}
    for key, name in SAMPLING.items():
        value = header.metadata.get(f"general.sampling.{key}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(str(np.float32(value))) if isinstance(value, float) else value
    return {"do_sample": True, **found} if found else {}


def rope_factors_of(header: GgufHeader) -> list[float]:
    """Return what each rotary frequency is divided by (tensor rope_freqs), [] for nothing."""
    info = header.tensors.get("rope_freqs.weight")
    if info is None:
        return []
    if info.dtype != "F32" or len(info.shape) != 1:
        raise CheckpointError(
            f"{header.path}: tensor 'rope_freqs.weight' is {info.dtype} {list(info.shape)}, "
            "expected F32 of one dimension"
        )
    with info.file.open("rb") as file:
        file.seek(info.begin)
        values: NDArray[Any] = np.frombuffer(file.read(info.end - info.begin), "<f4")
    return [] if bool(np.all(values == 1)) else [float(value) for value in values]


def _architecture(header: GgufHeader) -> str:
    metadata = header.metadata
    if metadata.get("general.type", "model") != "model":
        raise UnsupportedModelError(
            f"{header.path}: holds {repr(metadata['general.type'])[:40]}, expected a model",
            advice="merge an adapter into its model with llama.cpp's export-lora",
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError(
            f"{header.path}: one of {metadata['split.count']} parts of a split model",
            advice="join them: llama-gguf-split --merge FIRST-PART model.gguf",
        )
    name = metadata.get("general.architecture")
    known = sorted(ARCHITECTURES.keys() - {"mistral"})
    if name not in known:
        raise UnsupportedModelError(
            f"{header.path}: general.architecture {repr(name)[:40]} is not implemented, known: "
            f"{', '.join(known)} (Mistral's files say llama)",
            advice="use the checkpoint in safetensors, or build the nn.Module and pass that",
        )
    return str(name)


def _special_ids(header: GgufHeader) -> dict[str, Any]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {
        name: header.metadata[f"tokenizer.ggml.{short}_token_id"]
        for short, name in names.items()
        if f"tokenizer.ggml.{short}_token_id" in header.metadata
    }


def _rotary(header: GgufHeader, keys: _Keys, architecture: str, head_dim: int) -> dict[str, Any]:
    """Return rope_theta, rope_scaling and partial_rotary_factor."""
    found: dict[str, Any] = {"rope_theta": keys.get("rope.freq_base") or 10000.0}
    rotary_dim = keys.size("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        if architecture == "llama":  # llama.cpp refuses it too: the file permutes whole heads
            raise CheckpointError(
                f"{header.path}: llama.rope.dimension_count is {rotary_dim}, expected {head_dim}"
            )
        found["partial_rotary_factor"] = rotary_dim / head_dim
    scaling = _scaling(header, keys)
    factors = rope_factors_of(header)
    if factors and architecture != "llama":  # llama.cpp reads them for none of the others here
        raise UnsupportedModelError(
            f"{header.path}: rotary factors (rope_freqs) are not implemented for {architecture}"
        )
    if factors and scaling:
        raise UnsupportedModelError(
            f"{header.path}: rotary factors (rope_freqs) together with rope.scaling.type "
            f"{scaling['rope_type']!r} are not implemented"
        )
    if factors:
        scaling = {"rope_type": "frequency_factors", "frequency_factors": factors}
    return found | ({"rope_scaling": scaling} if scaling else {})


def _scaling(header: GgufHeader, keys: _Keys) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type")
    old = keys.get("rope.scale_linear")
    factor = keys.get("rope.scaling.factor") or old or 0.0
    trained = keys.get("rope.scaling.original_context_length")
    betas = {
        name: keys.get(f"rope.scaling.yarn_{name}")
        for name in ("beta_fast", "beta_slow")
        if keys.get(f"rope.scaling.yarn_{name}") is not None
    }
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor} if factor not in (0, 1) else {}
    if kind == "none":
        return {}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"{header.path}: rope.scaling.type {repr(kind)[:40]} is not implemented, known: none, "
            "linear, yarn"
        )
    scaling = {"rope_type": "yarn", "factor": factor or 1.0, **betas}
    return scaling | ({"original_max_position_embeddings": trained} if trained else {})


def _biases(header: GgufHeader, model_type: str) -> dict[str, Any]:
    """Say which biases the file has; a family that fixes one needs no field."""
    if model_type == "llama":
        return {
            "attention_bias": has_bias(header, "attn_q"),
            "mlp_bias": has_bias(header, "ffn_gate"),
        }
    return {"attention_bias": has_bias(header, "attn_q")} if model_type == "qwen3" else {}
