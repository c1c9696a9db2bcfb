"""The grid of a group of weights: its scale and zero point, searched for the least weighted error.

w is about (code - zero) * scale with codes 0 .. 2^bits - 1. What an error of a weight costs is the
mean square of the activation that it is multiplied with (the diagonal of the layer's Hessian), so
the search weighs by it; with equal importances it is the search of a plain load. Scales are rounded
as they are stored before an error is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aios_compile.errors import ConfigError

BITS, GROUPS = (4, 8), (32, 64, 128)
# How far inside (-) or beyond (+) the code range a group's largest value is sent, in codes.
REACHES = {4: (-1.6, -1.2, -0.8, -0.4, 0.0, 0.4, 0.8, 1.2), 8: (-1.0, 0.0)}
SHRINKS = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75), 8: (1.0, 0.99)}  # of an asymmetric group's range


@dataclass(frozen=True)
class Scheme:
    """How weights are quantised. `scales`: the dtype that scales are stored in."""

    bits: int = 4
    group: int = 32
    symmetric: bool = True
    scales: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits={self.bits!r} is out of range, expected 4 or 8")
        if self.group not in GROUPS:
            raise ConfigError(f"group={self.group!r} is out of range, expected 32, 64 or 128")

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def row_bits(self, depth: int) -> float:
        """Return the bits of a row of `depth` weights, scales and zero points included."""
        zero = 0 if self.symmetric else self.bits
        return depth * self.bits + depth / self.group * (8 * self.scales.itemsize + zero)


@dataclass(frozen=True)
class Quantized:
    """A matrix: codes uint8 [N, K], scales [N, G] as stored, zeros uint8 [N, G]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """Return the matrix float32 [N, K]."""
        rows, groups = self.scales.shape
        codes = self.codes.reshape(rows, groups, -1).float() - self.zeros.float().unsqueeze(-1)
        return (codes * self.scales.float().unsqueeze(-1)).reshape(rows, -1)


def codes_of(w: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """Return the nearest codes (as floats) of w [..., g] for scales and zeros [...]."""
    inverse = torch.where(scales != 0, 1 / scales.float(), 0.0).unsqueeze(-1)
    return (w * inverse).round_().add_(zeros.float().unsqueeze(-1)).clamp_(0, scheme.top)


def best_grid(w: Tensor, importance: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return (scales as stored, zeros uint8) of groups w float32 [M, g], each [M].

    importance: what a squared error of each column costs, [g] or [M, g].
    """
    candidates = _symmetric(w, importance, scheme) if scheme.symmetric else _ranges(w, scheme)
    least = torch.full_like(w[:, 0], torch.inf)
    best_scale = torch.zeros_like(least, dtype=scheme.scales)
    best_zero = torch.full_like(least, 1 << (scheme.bits - 1), dtype=torch.uint8)
    for scale, zero in candidates:
        stored = scale.to(scheme.scales)
        off = (codes_of(w, stored, zero, scheme) - zero.float().unsqueeze(-1)) * stored.float()[
            :, None
        ] - w
        error = (off.square_() * importance).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, stored, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _symmetric(w: Tensor, importance: Tensor, scheme: Scheme) -> list[tuple[Tensor, Tensor]]:
    """The largest value goes to the end of the range, or near it; then the scale is refitted."""
    half = 1 << (scheme.bits - 1)
    zero = torch.full_like(w[:, 0], half, dtype=torch.uint8)
    low, high = w.amin(-1), w.amax(-1)
    extreme = torch.where(high > -low, high, low)
    found = []
    for reach in REACHES[scheme.bits]:
        scale = extreme / -(half + reach)
        codes = codes_of(w, scale, zero, scheme) - half
        weighed = codes * importance
        norm = (weighed * codes).sum(-1)
        fitted = torch.where(norm > 0, (weighed * w).sum(-1) / norm, scale)
        found += [(scale, zero), (fitted, zero)]
    return found


def _ranges(w: Tensor, scheme: Scheme) -> list[tuple[Tensor, Tensor]]:
    """The range of the values and of zero, shrunk at both ends; zero itself is a code."""
    low, high = w.amin(-1).clamp_max(0.0), w.amax(-1).clamp_min(0.0)
    found = []
    for shrink in SHRINKS[scheme.bits]:
        scale = (high - low) * shrink / scheme.top
        zero = torch.where(scale > 0, (-low * shrink / scale).round(), 0.0)
        found.append((scale, zero.clamp(0, scheme.top).to(torch.uint8)))
    return found


def round_to_nearest(weight: Tensor, importance: Tensor, scheme: Scheme) -> Quantized:
    """Quantise weight float32 [N, K] group by group, each weight to its nearest code."""
    rows, depth = weight.shape
    groups = weight.reshape(-1, scheme.group)
    costs = importance.reshape(-1, scheme.group).repeat(rows, 1)
    scales, zeros = best_grid(groups, costs, scheme)
    codes = codes_of(groups, scales, zeros, scheme).to(torch.uint8)
    shape = (rows, depth // scheme.group)
    return Quantized(codes.reshape(rows, depth), scales.reshape(shape), zeros.reshape(shape))
