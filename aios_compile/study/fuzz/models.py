"""Whole tiny models of random configurations: a folder as users have it, against eager float64."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aios_compile.api import load_and_compile
from aios_compile.codegen.cpp import build
from aios_compile.models.config import FAMILIES, ModelConfig
from aios_compile.models.decoder import Decoder
from aios_compile.models.parameters import parameter_shapes, tied_parameters
from aios_compile.study.fuzz.example import FuzzFailure, message
from aios_compile.study.fuzz.judge import compare
from aios_compile.study.fuzz.program import hash_of

LENGTHS = (1, 2, 15, 16, 17, 33, 48)
ROUNDING = ("round_activations",)
LIMITS = {"max_model_len": 64, "max_num_batched_tokens": 32, "max_num_seqs": 2}


def draw_config(seed: int, number: int) -> dict[str, Any]:
    """Draw the config.json of a tiny model of one of the families."""
    rng = random.Random(f"model {seed}/{number}")
    family = rng.choice(sorted(FAMILIES))
    groups = rng.choice([1, 2, 3])
    heads = groups * rng.choice([1, 2, 4])
    width = rng.choice([8, 10, 16, 24, 32])
    window = rng.choice([None, 5, 16, 17, 40])
    config: dict[str, Any] = {
        "model_type": family,
        "architectures": [FAMILIES[family].architecture],
        "vocab_size": rng.choice([61, 128, 131]),
        "hidden_size": heads * width if family == "qwen2" else rng.choice([32, 48, 60]),
        "intermediate_size": rng.choice([48, 70, 96]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
        "max_position_embeddings": 64,
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 0.01]),
        "rope_theta": rng.choice([500.0, 10000.0, 1e6]),
        "tie_word_embeddings": rng.random() < 0.3,
        "hidden_act": rng.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu"]),
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": rng.choice(["float32", "float32", "bfloat16"]),
    }
    if family == "mistral":
        config["sliding_window"] = window
    if family in ("qwen2", "qwen3") and window and rng.random() < 0.5:
        config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    if family in ("llama", "qwen3"):
        config["attention_bias"] = rng.random() < 0.3
    return config


def write_model(config: dict[str, Any], folder: Path, seed: int) -> Path:
    """Write a model folder with seeded weights of about unit gain; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    known = ModelConfig.from_dict(config)
    tied = tied_parameters(known)
    dtype = getattr(torch, config["torch_dtype"])
    tensors = {
        name: _draw(name, shape, seed).to(dtype)
        for name, shape in parameter_shapes(known).items()
        if name not in tied
    }
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash_of(name, seed))
    values = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * values
    return values * (0.3 if len(shape) == 1 else 1.0 if "embed" in name else shape[-1] ** -0.5)


def run_model(config: dict[str, Any], folder: Path, cache: Path, seed: int = 0) -> float:
    """Compile a model folder, run prompts of all lengths, compare logits with eager.

    Return the largest share of a budget. Raises FuzzFailure. Prompts beyond a step's tokens are
    computed in chunks over pages. Keys and values are kept in float32, as eager has them. A model
    in bf16 runs twice: with the activations that it has, and, where products of bf16 round them
    (passes/round_activations.py), within 4 times the error of eager in bf16.
    """
    path = write_model(config, folder, seed)
    exact = _run(path, config, cache, seed, torch.float32, ROUNDING)
    if config["torch_dtype"] != "bfloat16" or not build.Target.host().bf16_dot:
        return exact
    return max(exact, _run(path, config, cache, seed, torch.bfloat16, ()))


def _run(
    path: Path,
    config: dict[str, Any],
    cache: Path,
    seed: int,
    computed_in: torch.dtype,
    disabled: tuple[str, ...],
) -> float:
    """Hold a folder to the error of eager in a dtype; return the largest share of a budget."""
    eager, oracle = (_eager(config, seed, dtype) for dtype in (computed_in, torch.float64))
    worst = 0.0
    options: dict[str, Any] = {**LIMITS, "num_threads": 1, "progress": False, "cache_dir": cache}
    options |= {"kv_cache_dtype": "float32", "disable_passes": disabled}
    with load_and_compile(str(path), **options) as model:
        for length in LENGTHS:
            ids = [(i * 7919 + seed) % (config["vocab_size"] - 1) + 1 for i in range(length)]
            got = torch.as_tensor(model(ids))
            given = torch.tensor(ids)
            with torch.no_grad():
                want = [m(given, torch.arange(length)) for m in (oracle, eager)]
            rows = [w.reshape(-1, w.shape[-1]) for w in want]
            for verdict in compare(rows[:1], rows[1:], [got]):
                if not verdict.holds:
                    raise FuzzFailure(f"{message(verdict, f'T={length}')} of {config}")
                worst = max(worst, verdict.error / verdict.budget)
    return worst


def _eager(config: dict[str, Any], seed: int, dtype: torch.dtype) -> torch.nn.Module:
    """Return the reference decoder with the folder's weights, as stored, computing in `dtype`."""
    model = Decoder(ModelConfig.from_dict(config)).eval().requires_grad_(False)
    stored = getattr(torch, config["torch_dtype"])
    for name, parameter in model.named_parameters():
        parameter.data = _draw(name, tuple(parameter.shape), seed).to(stored).to(dtype)
    return model.to(dtype)
