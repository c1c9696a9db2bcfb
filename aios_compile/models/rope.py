"""Rotary position embedding: the frequencies of each variant, the tables and their application.

Frequencies and angles are float32 always: a bfloat16 table destroys long positions. Sources: RoPE,
Su et al. 2021; linear interpolation, Chen et al. 2023; NTK-aware "dynamic" scaling, the bloc97 and
emozilla posts of 2023; YaRN, Peng et al. 2023; llama3, the Llama 3.1 model card. Values agree with
transformers.

Shapes: T tokens, H heads, E head size, R rotary size (even, at most E; the other dims pass
through).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aios_compile.models.config import RopeConfig


class RotaryEmbedding(nn.Module):
    """Positions to the cos and sin tables [..., T, R], computed in float32, cast to `dtype`."""

    inv_freq: Tensor
    exponents: Tensor

    def __init__(self, rope: RopeConfig) -> None:
        super().__init__()
        self.rope = rope
        # On the CPU also under torch.device("meta"): a buffer that no checkpoint fills stays real.
        self.register_buffer("inv_freq", inverse_frequencies(rope), persistent=False)
        self.register_buffer("exponents", _exponents(rope.rotary_dim), persistent=False)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq
        if self.rope.rope_type == "dynamic":
            inv_freq = self.dynamic_frequencies(position_ids)
        angles = position_ids[..., None].to(torch.float32) * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        scale = self.rope.attention_factor
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def dynamic_frequencies(self, position_ids: Tensor) -> Tensor:
        """Return float32 [..., T, R / 2]: the base grows with the length of each token's
        sequence.
        """
        rope, dim = self.rope, self.rope.rotary_dim
        lengths = (position_ids.amax(-1, keepdim=True) + 1).expand_as(position_ids)
        ratio = lengths.clamp(min=rope.max_position_embeddings) / rope.max_position_embeddings
        stretch = 1.0 + rope.factor * (ratio - 1.0)
        base = rope.theta * stretch ** (dim / (dim - 2))
        return 1.0 / base[..., None] ** self.exponents


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dims of x [..., T, H, E] by the tables [..., T, R]; halves are the
    pairs.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        return x * cos + rotate_half(x) * sin
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat((rotated * cos + rotate_half(rotated) * sin, rest), dim=-1)


def rotate_half(x: Tensor) -> Tensor:
    """Return (-second half, first half) of the last dim."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Return the float32 frequencies [R / 2] of a RoPE variant, on the CPU."""
    inv_freq = 1.0 / rope.theta ** _exponents(rope.rotary_dim)
    if rope.rope_type == "linear":
        return inv_freq / rope.factor
    if rope.rope_type == "frequency_factors":
        return inv_freq / torch.tensor(rope.frequency_factors, device="cpu")
    if rope.rope_type == "llama3":
        return _llama3(inv_freq, rope)
    if rope.rope_type == "yarn":
        return _yarn(inv_freq, rope)
    return inv_freq  # default; dynamic up to its trained length


def _exponents(rotary_dim: int) -> Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, blend those between."""
    length, low, high = (
        rope.original_max_position_embeddings,
        rope.low_freq_factor,
        rope.high_freq_factor,
    )
    wavelength = 2 * math.pi / inv_freq
    blend = (length / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
    slow, fast = wavelength > length / low, wavelength < length / high
    return torch.where(slow, inv_freq / rope.factor, torch.where(fast, inv_freq, blended))


def _yarn(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Interpolate the dims that turn fewer than beta_slow times over the trained length, keep those
    that turn more than beta_fast times, ramp linearly between."""
    dim = rope.rotary_dim

    def dim_of(rotations: float) -> float:
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, without a division by zero
    index = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((index - low) / (high - low)).clamp(0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)
