"""The names and shapes of a decoder's parameters, without building it. Free of torch."""

from __future__ import annotations

from aios_compile.models.config import ModelConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its Hugging Face name, the tied head included."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads, config.num_key_value_heads
    q, kv = q * config.head_dim, kv * config.head_dim
    linears = {  # out, in, bias
        "self_attn.q_proj": (q, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name, size in norms.items():
            shapes[f"{prefix}{name}.weight"] = (size,)
    return shapes | {"model.norm.weight": (hidden,), HEAD: (config.vocab_size, hidden)}


def tied_parameters(config: ModelConfig) -> dict[str, str]:
    """Return the aliases: the head shares the embedding's values where config.json ties them."""
    return {HEAD: EMBEDDING} if config.tie_word_embeddings else {}
