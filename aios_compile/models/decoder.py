"""The eager reference decoder: Llama, Mistral, Qwen2 and Qwen3 in plain PyTorch.

This is the definition of correct, and it is itself what the compiler captures. Parameter names
equal the Hugging Face names, so that checkpoint tensors bind one to one. The order of casts is
transformers'.

Shapes: T tokens, D hidden, H query heads, K key/value heads, E head size, R rotary size. `...` is
an optional batch: token ids are [T] (what is captured) or [B, T].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aios_compile.models.config import ModelConfig
from aios_compile.models.rope import RotaryEmbedding, apply_rope


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation of the GPT-2 code."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


class RMSNorm(nn.Module):
    """y = weight * x / rms(x), the quotient in float32 and cast back before the weight is
    applied.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.to(torch.float32)
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions; `window` keys at most, None for all."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.window = window
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # [..., T, H, E]
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))  # [..., T, K, E]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)  # [..., H, T, E]
        if self.window is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            mask = sliding_window_mask(position_ids, self.window)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        y: Tensor = self.o_proj(out.transpose(-3, -2).flatten(-2))
        return y


def sliding_window_mask(position_ids: Tensor, window: int) -> Tensor:
    """Return bool [..., 1, T, T]: position p sees the keys p - window + 1 .. p."""
    distance = position_ids[..., :, None] - position_ids[..., None, :]
    return ((distance >= 0) & (distance < window)).unsqueeze(-3)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return y


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.self_attn = Attention(config, window)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, position_ids)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Backbone(nn.Module):
    """Token embedding, the layers and the last norm: everything below the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, window) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(position_ids, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, position_ids)
        x = self.norm(x)
        return x


class Decoder(nn.Module):
    """A causal language model: token ids and positions (int64 [..., T]) to logits [..., T,
    vocab].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(input_ids, position_ids))
        return logits
