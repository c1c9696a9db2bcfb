"""Tensor names of GGUF files and their Hugging Face names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_compile.checkpoint.gguf_header import GgufHeader

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_OUTSIDE = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.(weight|bias)")


def hf_name(name: str) -> str | None:
    """Return the Hugging Face name of a tensor, None for one that these architectures lack."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _INSIDE:
        return None
    return f"model.layers.{match[1]}.{_INSIDE[match[2]]}.{match[3]}"


def has_bias(header: GgufHeader, part: str) -> bool:
    """Say whether the first layer's `part`, e.g. "attn_q", has a bias."""
    return f"blk.0.{part}.bias" in header.tensors
