"""Random checkpoints with the shapes of well-known models, for speed only: the text is noise.

python -m benchmarks.shapes qwen3-0.6b /tmp/qwen3-0.6b
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from aios_compile.models.config import ModelConfig
from aios_compile.models.parameters import parameter_shapes, tied_parameters

TOKENIZER_FOLDER = Path(__file__).parents[1] / "examples" / "shakespeare"

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
    },
    "qwen3-1.7b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    },
    "micro": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 256,
    },
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 2048,
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
    },
}  # fmt: skip


def config_of(shape: str, num_layers: int | None = None) -> dict[str, Any]:
    """Return config.json of a shape, with another depth if asked."""
    config = {**SHAPES[shape], "hidden_act": "silu", "torch_dtype": "bfloat16"}
    config["num_hidden_layers"] = num_layers or config["num_hidden_layers"]
    return config


def make(shape: str, folder: Path, num_layers: int | None = None, seed: int = 0) -> Path:
    """Write a bf16 checkpoint of random weights (never zeros); return the folder.

    Linears are normal with standard deviation 0.02, norms are ones with noise. An existing folder
    with the same config is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape, num_layers)
    wanted = json.dumps(config, indent=1)
    present = folder / "config.json"
    if present.exists() and present.read_text() == wanted:
        return folder
    rng = np.random.default_rng(seed)
    parsed = ModelConfig.from_dict(config)
    tied = tied_parameters(parsed)
    tensors = {}
    for name, dims in parameter_shapes(parsed).items():
        if name in tied:
            continue
        scale, shift = (0.05, 1.0) if len(dims) == 1 and "bias" not in name else (0.02, 0.0)
        values = rng.standard_normal(dims, np.float32) * np.float32(scale) + np.float32(shift)
        tensors[name] = _bfloat16(values)
    _save(tensors, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (TOKENIZER_FOLDER / name).exists():
            shutil.copyfile(TOKENIZER_FOLDER / name, folder / name)
    present.write_text(wanted)
    return folder


def _bfloat16(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, Any]:
    """Round float32 to bfloat16, to nearest even; returned as its bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _save(tensors: dict[str, Any], path: Path) -> None:
    """Write a safetensors file whose uint16 tensors are bfloat16."""
    header: dict[str, Any] = {}
    offset = 0
    for name, array in tensors.items():
        span = [offset, offset + array.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(array.tobytes())


if __name__ == "__main__":
    print(make(sys.argv[1], Path(sys.argv[2])))
