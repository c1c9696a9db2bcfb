"""Tiny Hugging Face causal LMs with random weights, one a family and variant.

Weights are scaled up so that every component moves the logits: with the default initialisation a
wrong mask or a forgotten bias would hide below the tolerance.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.foreign.experts import EXPERTS
from tests.foreign.sizes import GROUPED, LAYERS, NARROW, SIZES, VOCABULARY

GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name -> (class stem in transformers, arguments of its config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **EXPERTS,
    "llama": ("Llama", {**SIZES, **GROUPED}),
    "mistral": ("Mistral", {**SIZES, **GROUPED, "sliding_window": 7}),
    "qwen2": ("Qwen2", {**SIZES, **GROUPED}),
    "qwen3": ("Qwen3", {**SIZES, **GROUPED, **NARROW}),
    "gemma": ("Gemma", {**SIZES, **GROUPED, **NARROW}),
    "gemma2": (
        "Gemma2",
        {**SIZES, **GROUPED, **NARROW, "sliding_window": 7, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "Gemma3",
        {**SIZES, **GROUPED, **NARROW, "sliding_window": 7, "layer_types": LAYERS},
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", {**SIZES, "rotary_pct": 0.5}),
    "gpt_neox_serial": ("GPTNeoX", {**SIZES, "use_parallel_residual": False}),
    "gptj": ("GPTJ", {**GPT2, "rotary_dim": 4}),
    "phi": ("Phi", {**SIZES, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {**SIZES, **GROUPED, "sliding_window": 7}),
    "phi3_long": (
        "Phi3",
        {
            **SIZES,
            **GROUPED,
            "rope_scaling": {  # as transformers 4 calls it too
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5],
            },
            "original_max_position_embeddings": 16,  # the config's own default goes before
        },
    ),
    "olmo": ("Olmo", {**SIZES, **GROUPED, "clip_qkv": 0.5}),
    "olmo2": ("Olmo2", {**SIZES, **GROUPED}),
    "olmo3": ("Olmo3", {**SIZES, **GROUPED, "sliding_window": 7, "layer_types": LAYERS}),
    "cohere": ("Cohere", {**SIZES, **GROUPED, "logit_scale": 0.25}),
    "cohere2": ("Cohere2", {**SIZES, **GROUPED, "sliding_window": 7, "layer_types": LAYERS}),
    "falcon": ("Falcon", {**SIZES, "alibi": False, "new_decoder_architecture": False}),
    "falcon_new": ("Falcon", {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon_alibi": ("Falcon", {**SIZES, "alibi": True, "new_decoder_architecture": False}),
    "stablelm": (
        "StableLm",
        {**SIZES, **GROUPED, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    ),
    "stablelm_qk": (
        "StableLm",
        {**SIZES, **GROUPED, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    ),
    "starcoder2": ("Starcoder2", {**SIZES, **GROUPED, "sliding_window": 7}),
    "granite": (
        "Granite",
        {
            **SIZES,
            **GROUPED,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    "opt": ("OPT", {**SIZES, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "smollm3": ("SmolLM3", {**SIZES, **GROUPED, "no_rope_layers": [1, 0]}),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "mpt": (
        "Mpt",
        {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    ),
    "glm": ("Glm", {**SIZES, **GROUPED, "head_dim": 16}),
    "glm4": ("Glm4", {**SIZES, **GROUPED, "head_dim": 16}),
    "nemotron": ("Nemotron", {**SIZES, **GROUPED}),
    "persimmon": ("Persimmon", {**SIZES}),
    "exaone4": ("Exaone4", {**SIZES, **GROUPED, "sliding_window": 7, "layer_types": LAYERS}),
    "helium": ("Helium", {**SIZES, **GROUPED, "head_dim": 12}),
    "codegen": ("CodeGen", {**GPT2, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCode", GPT2),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 7,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "llama4": (
        "Llama4",
        {
            **SIZES,
            **GROUPED,
            **NARROW,
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 80,
            "moe_layers": [],
            "no_rope_layers": [1, 0],
        },
    ),
    "arcee": ("Arcee", {**SIZES, **GROUPED}),
    "seed_oss": ("SeedOss", {**SIZES, **GROUPED, "head_dim": 12}),
    "ernie4_5": ("Ernie4_5", {**SIZES, **GROUPED, "head_dim": 12}),
    "hunyuan": ("HunYuanDenseV1", {**SIZES, **GROUPED, "head_dim": 12}),
    "biogpt": ("BioGpt", SIZES),
    "xglm": (
        "XGLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 48,
            "ffn_dim": 80,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "mamba": (
        "Mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 4},
    ),
}


def build(name: str, **changed: Any) -> nn.Module:
    """Return a family's tiny model in eval mode, float32, seeded; changed: of its arguments."""
    stem, arguments = FAMILIES[name]
    make = config_class(stem)
    config = make(**copy.deepcopy({**arguments, **changed}))  # transformers changes some in place
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(stem)(config)
    scale_up(model)
    return model.eval()


def run(model: nn.Module, count: int) -> torch.Tensor:
    """Return the logits of `count` tokens, as a user has seen them before compiling."""
    ids = torch.arange(count)[None] % VOCABULARY
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0]


def longrope_branches():
    """Return whether this transformers chooses the factors with an `if` on the positions' values.

    No graph holds that, so it is refused by its line; newer ones choose with torch.where.
    """
    from transformers import modeling_rope_utils

    text = inspect.getsource(modeling_rope_utils.dynamic_rope_update)
    return "if seq_len > original_max_position_embeddings" in text


def config_class(stem: str) -> Callable[..., Any]:
    import transformers

    return getattr(transformers, f"{stem}TextConfig", None) or getattr(
        transformers, f"{stem}Config"
    )


def model_class(stem: str) -> Callable[..., nn.Module]:
    import transformers

    return getattr(transformers, f"{stem}ForCausalLM", None) or getattr(
        transformers, f"{stem}LMHeadModel"
    )


def scale_up(model: nn.Module) -> None:
    """Give matrices unit gain, biases and norm weights values that matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(noise / p.shape[-1] ** 0.5)
            else:
                p.add_(noise * 0.3)
