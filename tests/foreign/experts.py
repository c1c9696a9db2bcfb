"""Mixture-of-experts families, tiny: name -> (class stem in transformers, arguments)."""

from __future__ import annotations

from typing import Any

from tests.foreign.sizes import GROUPED, LAYERS, NARROW, SIZES, VOCABULARY

ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {**ROUTED, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
WINDOWED = {"sliding_window": 7, "layer_types": LAYERS}
LATENT = {  # multi-head latent attention
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
BASE = {**SIZES, **GROUPED}

EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**BASE, **LOCAL}),
    "gpt_oss": ("GptOss", {**BASE, **NARROW, **LOCAL, **WINDOWED}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**BASE, **ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**BASE, **NARROW, **ROUTED, "num_experts": 4, "norm_topk_prob": True},
    ),
    "olmoe": ("Olmoe", {**BASE, **ROUTED, "num_experts": 4}),
    "flex_olmo": ("FlexOlmo", {**BASE, "num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("Phimoe", {**BASE, **LOCAL, "sliding_window": 7}),
    "granitemoe": (
        "GraniteMoe",
        {**BASE, **LOCAL, "attention_multiplier": 0.2, "residual_multiplier": 0.7},
    ),
    "granitemoeshared": ("GraniteMoeShared", {**BASE, **LOCAL, "shared_intermediate_size": 40}),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **LATENT,
            **SHARED,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_method": "group_limited_greedy",
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **LATENT,
            **SHARED,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "glm4_moe_lite": ("Glm4MoeLite", {**LATENT, **SHARED}),
    "mistral4": ("Mistral4", {**LATENT, **SHARED}),
    "dots1": (
        "Dots1",
        {**BASE, **SHARED, **WINDOWED, "first_k_dense_replace": 0, "n_group": 2},
    ),
    "glm4_moe": ("Glm4Moe", {**BASE, **NARROW, **SHARED, "first_k_dense_replace": 1}),
    "solar_open": ("SolarOpen", {**BASE, **NARROW, **SHARED}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            **BASE,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0,
        },
    ),
    "hunyuan_moe": ("HunYuanMoEV1", {**BASE, "head_dim": 12, "num_experts": 4, "moe_topk": 2}),
    "minimax": ("MiniMax", {**BASE, **NARROW, **LOCAL, "layer_types": ["full_attention"] * 2}),
    "minimax_m2": ("MiniMaxM2", {**BASE, **NARROW, **LOCAL}),
    "exaone_moe": (
        "ExaoneMoe",
        {
            **BASE,
            **ROUTED,
            **WINDOWED,
            "num_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_shared_experts": 1,
            "is_moe_layer": [False, True],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            **BASE,
            **ROUTED,
            "num_experts": 4,
            "num_dense_layers": 1,
            "layer_types": ["full_attention"] * 2,
        },
    ),
    "mimo_v2_flash": (
        "MiMoV2Flash",
        {
            **BASE,
            **NARROW,
            **ROUTED,
            **WINDOWED,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "cohere2_moe": ("Cohere2Moe", {**BASE, **ROUTED, **WINDOWED, "num_experts": 4}),
    "dbrx": (
        "Dbrx",
        {
            "vocab_size": VOCABULARY,
            "d_model": 48,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
            "ffn_config": {
                "ffn_hidden_size": 24,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 48,
            },
        },
    ),
}
