"""What a step must move and compute at least, counted from config.json, and the time that takes.

The floor of a step is max(bytes / read bandwidth, operations / peak). Bytes: each weight once (the
output matrix included, the embedding table not, where it is another one) and the keys and values
of every token of context once. Operations: 2 for each weight and token in the linears (the output
matrix for the rows whose logits are asked for), 4 for each channel of each pair of a query and a
key that it sees. Norms, activations and logits are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Bits a weight of the rows that are compared: a group of 32 codes has a scale of 16 bits.
BITS = {"bf16": 16.0, "int8": 8.5, "int4": 4.5}


@dataclass(frozen=True)
class Work:
    """Sizes of a decoder: weights of its linears and its head, KV bytes and channels a token."""

    linear_weights: int
    head_weights: int
    kv_values: int  # a token, keys and values of all layers
    query_channels: int  # of all layers

    @staticmethod
    def of(config: Mapping[str, Any]) -> Work:
        """Count a dense gated decoder (Llama, Qwen) from its config.json."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads", heads)
        width = config.get("head_dim") or hidden // heads
        projections = hidden * width * (2 * heads + 2 * kv_heads)
        mlp = 3 * hidden * config["intermediate_size"]
        return Work(
            layers * (projections + mlp),
            hidden * config["vocab_size"],
            2 * layers * kv_heads * width,
            layers * heads * width,
        )

    def weight_bytes(self, bits: float) -> float:
        """Return the bytes of the matrices that a step reads, at `bits` a weight."""
        return (self.linear_weights + self.head_weights) * bits / 8

    def kv_bytes(self, bits: float = 16.0) -> float:
        """Return the bytes of keys and values a token of context."""
        return self.kv_values * bits / 8

    def linear_operations(self, tokens: int, rows: int) -> int:
        """Return the operations of `tokens` tokens of which `rows` have logits."""
        return 2 * (self.linear_weights * tokens + self.head_weights * rows)

    def attention_operations(self, tokens: int, context: int = 0) -> int:
        """Return those of `tokens` tokens behind `context` others, each seeing those before it."""
        pairs = tokens * context + tokens * (tokens + 1) // 2
        return 4 * self.query_channels * pairs


@dataclass(frozen=True)
class Rates:
    """What the machine does at best, measured: bytes and operations a second."""

    bandwidth: float
    fma: float
    int8: float
    bf16: float  # of the processor's bf16 dot products; the float32 peak where it has none

    def better(self, other: Rates) -> Rates:
        """Return the higher of each."""
        return Rates(
            max(self.bandwidth, other.bandwidth),
            max(self.fma, other.fma),
            max(self.int8, other.int8),
            max(self.bf16, other.bf16),
        )

    def of_products(self, weights: str) -> float:
        """Return the peak for the linears of a row (bf16, int8, int4)."""
        return self.bf16 if weights == "bf16" else self.int8


def decode_floor(
    rates: Rates, work: Work, weights: str, weight_bytes: float, batch: int, context: int
) -> float:
    """Return the seconds of a step of `batch` sequences with `context` tokens each."""
    moved = weight_bytes + batch * context * work.kv_bytes()
    computed = work.linear_operations(batch, batch) / rates.of_products(weights)
    computed += batch * work.attention_operations(1, context) / rates.fma
    return max(moved / rates.bandwidth, computed)


def prefill_floor(
    rates: Rates, work: Work, weights: str, weight_bytes: float, tokens: int
) -> float:
    """Return the seconds of a prompt of which one row has logits."""
    computed = work.linear_operations(tokens, 1) / rates.of_products(weights)
    computed += work.attention_operations(tokens) / rates.fma
    return max(weight_bytes / rates.bandwidth, computed)
