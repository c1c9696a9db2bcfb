"""The sizes that the tiny configs of all families share."""

from __future__ import annotations

from typing import Any

VOCABULARY = 67
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
NARROW = {"head_dim": 16}
LAYERS = ["sliding_attention", "full_attention"]
