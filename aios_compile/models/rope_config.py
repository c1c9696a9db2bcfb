"""What config.json says about rotary positions, in the old style (rope_scaling) and the new one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from aios_compile.errors import UnsupportedModelError
from aios_compile.models.fields import Fields

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "frequency_factors")
DEFAULT_THETA = 10000.0
MAX_LENGTH = 1 << 30


@dataclass(frozen=True)
class RopeConfig:
    """One RoPE variant; the fields that its type does not use keep their defaults.

    frequency_factors: what each frequency is divided by (GGUF files carry Llama 3's scaling so).
    """

    rope_type: str
    theta: float
    rotary_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    factor: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    frequency_factors: tuple[float, ...] = ()


def read_rope(
    top: Fields, head_dim: int, max_position_embeddings: int
) -> tuple[RopeConfig, tuple[str, ...]]:
    """Return the RoPE of a config and the keys of its RoPE dict that were ignored.

    `rope_scaling` wins over `rope_parameters`, as in transformers; theta and the partial factor are
    taken from the dict first, then from the top level. A partial factor is honoured for every type.
    """
    values = top.get("rope_scaling") or top.get("rope_parameters") or {}
    if not isinstance(values, Mapping):
        raise top.wrong("rope_scaling", values, "an object")
    for key, value in values.items():
        if isinstance(value, Mapping):
            raise UnsupportedModelError(
                f"{top.where}: rope parameters by layer type ({key!r}) are not implemented"
            )
    theta = top.get_float("rope_theta", DEFAULT_THETA, 1.001, 1e15)
    partial = top.get_float("partial_rotary_factor", 1.0, 0.0, 1.0)
    trained = top.get_int("original_max_position_embeddings", 0, 0, MAX_LENGTH)
    rope = Fields(values, f"{top.where}: rope_parameters")
    rope_type = rope.get_name("rope_type") or rope.get_name("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{top.where}: rope type {rope_type!r} is not implemented, known: "
            f"{', '.join(ROPE_TYPES)}"
        )
    rope.get("type")  # read, also where rope_type stands beside it
    if rope.get("mrope_section") is not None:
        raise UnsupportedModelError(f"{top.where}: rope mrope_section is not implemented")
    theta = rope.get_float("rope_theta", theta, 1.001, 1e15)
    partial = rope.get_float("partial_rotary_factor", partial, 0.0, 1.0)
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2 or (rope_type == "dynamic" and rotary_dim < 4):
        raise top.wrong("partial_rotary_factor", partial, f"an even part of head_dim {head_dim}")
    config = _read_type(rope, rope_type, theta, rotary_dim, max_position_embeddings, trained)
    return config, tuple(f"rope_parameters.{key}" for key in sorted(values.keys() - rope.read))


def _read_type(
    rope: Fields, rope_type: str, theta: float, rotary_dim: int, max_length: int, trained: int
) -> RopeConfig:
    if rope_type == "default":
        return RopeConfig(rope_type, theta, rotary_dim, max_length, max_length)
    if rope_type == "frequency_factors":
        factors = _frequency_factors(rope, rotary_dim // 2)
        return RopeConfig(
            rope_type, theta, rotary_dim, max_length, max_length, frequency_factors=factors
        )
    if rope_type not in ("yarn", "llama3"):
        factor = _factor(rope, None)
        return RopeConfig(rope_type, theta, rotary_dim, max_length, max_length, factor)
    inner = rope.get_int("original_max_position_embeddings", max_length, 1, MAX_LENGTH)
    trained = trained or inner
    if rope_type == "yarn":
        factor = _factor(rope, max_length / trained)
        return RopeConfig(
            rope_type,
            theta,
            rotary_dim,
            max_length,
            trained,
            factor,
            _yarn_attention_factor(rope, factor),
            # transformers writes `or`: a zero or null means the default
            rope.get_float("beta_fast", 32.0, 0.0, 1e6) or 32.0,
            rope.get_float("beta_slow", 1.0, 0.0, 1e6) or 1.0,
            rope.get_bool("truncate", True),
        )
    low = rope.get_float("low_freq_factor", math.nan, 1e-6, 1e6)
    high = rope.get_float("high_freq_factor", math.nan, 1e-6, 1e6)
    if not low < high:
        raise rope.wrong("high_freq_factor", high, f"more than low_freq_factor {low:g}")
    return RopeConfig(
        rope_type,
        theta,
        rotary_dim,
        max_length,
        trained,
        _factor(rope, None),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _frequency_factors(rope: Fields, count: int) -> tuple[float, ...]:
    values = rope.get("frequency_factors")
    good = isinstance(values, list) and len(values) == count
    if not good or not all(isinstance(v, (int, float)) and 1e-3 <= v <= 1e6 for v in values):
        raise rope.wrong("frequency_factors", values, f"{count} numbers from 0.001 to 1e6")
    return tuple(float(value) for value in values)


def _factor(rope: Fields, default: float | None) -> float:
    return rope.get_float("factor", math.nan if default is None else default, 1e-3, 1e6)


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """Return YaRN's temperature as a factor on cos and sin; mscale as in DeepSeek's variant."""
    mscale = rope.get_float("mscale", 0.0, 0.0, 1e3)
    mscale_all_dim = rope.get_float("mscale_all_dim", 0.0, 0.0, 1e3)

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    inferred = temperature(1.0)
    if mscale and mscale_all_dim:
        inferred = temperature(mscale) / temperature(mscale_all_dim)
    return rope.get_float("attention_factor", inferred, 1e-3, 1e3)
