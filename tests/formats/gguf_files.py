"""Write GGUF files with the gguf package from Hugging Face folders, as llama.cpp's converter does.

`convert` returns what the file's tensors mean by the package's own dequantisers, under the names
of the folder, so that transformers can be run on exactly those weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

Array = np.ndarray[Any, Any]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SIX_BIT = ("Q4_K", "Q5_K", "Q6_K")


def gguf_name(name: str) -> str:
    """Return ggml's name of a Hugging Face tensor."""
    stem, _, ending = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{NAMES[part]}.{ending}"
    return f"{NAMES[stem]}.{ending}"


def random_blocks(kind: Kind, rows: int, columns: int, seed: int) -> Array:
    """Return random blocks, every code possible, with scales such that weights are about 0.05."""
    generator = np.random.default_rng(seed)
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (rows, columns // weights, size), dtype=np.uint8)
    halves = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for at in halves:
        scale = generator.uniform(0.5, 1, data.shape[:2]) * (6e-5 if kind is Kind.Q6_K else 4e-4)
        data[:, :, at : at + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def encode(values: Array, kind: Kind, seed: int) -> Array:
    """Return a tensor's data in `kind`; for the K types, which the package cannot write, random."""
    if kind.name in SIX_BIT:
        return random_blocks(kind, *values.shape, seed)
    return quantize(values, kind)


def permute(rows: Array, heads: int) -> Array:
    """Put the halves of each head's rows side by side: what llama.cpp's converter does to q, k."""
    size = len(rows) // heads
    order = [
        head * size + part * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for part in (0, 1)
    ]
    return rows[order]


def write_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write what config.json says, with the keys that llama.cpp reads."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if writer.arch == "llama":
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config["vocab_size"])
    if config.get("sliding_window") and config["model_type"] == "mistral":
        writer.add_sliding_window(config["sliding_window"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def rope_factors(config: Mapping[str, Any]) -> Array | None:
    """Return what llama.cpp's converter writes for Llama 3's RoPE: factors of the frequencies."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type") != "llama3":
        return None
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    factors = []
    for i in range(0, dim, 2):
        turns = rope["original_max_position_embeddings"] * theta ** (-i / dim) / (2 * np.pi)
        share = (turns - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        share = min(max(share, 0.0), 1.0)
        factors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.array(factors, np.float32)


def convert(
    folder: Path,
    path: Path,
    kind_of: Callable[[str], Kind],
    finish: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> dict[str, torch.Tensor]:
    """Write a GGUF file; return the float32 values of its tensors by their names in the folder.

    kind_of(name): the type of a tensor of two dimensions; others are F32. finish: writes more keys.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = "llama" if config["model_type"] in ("llama", "mistral") else config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, config)
    finish(writer)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    meant = {}
    for seed, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        values = tensor.float().numpy()
        kind = kind_of(name) if values.ndim == 2 else Kind.F32
        data = encode(values, kind, seed)
        value = dequantize(data, kind) if kind != Kind.F32 else data
        meant[name] = torch.from_numpy(np.ascontiguousarray(value).reshape(values.shape))
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:
            data = permute(data, heads[part])
        if kind in (Kind.F32, Kind.F16):  # the writer takes their type from numpy
            writer.add_tensor(gguf_name(name), data)
        else:
            writer.add_tensor(gguf_name(name), data.view(np.uint8), raw_dtype=kind)
    if (factors := rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    close(writer)
    return meant


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_weights(folder: Path, target: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Copy a model folder with other weights, in float32."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, target)
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors")
    return target
