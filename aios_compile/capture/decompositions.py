"""Decompositions of operators that torch's table keeps whole, or decomposes for fixed sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

aten = torch.ops.aten


def _outer_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return a product over k = 1 as a pointwise one, which keeps tokens apart by its looks.

    Older releases of transformers make the angles of RoPE so: inverse frequencies times positions.
    """
    k = left.shape[-1]
    return left * right if isinstance(k, int) and k == 1 else NotImplemented


def _copy(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Return what x holds after x.copy_(source)."""
    return source.to(x.dtype).expand(x.shape).clone()


def _cumsum(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Sum up along a dimension as a product with a triangle of ones: there is no scan kernel.

    T * T products for a cumulative sum over tokens; whole numbers are exact up to 2**24.
    """
    result = dtype or (x.dtype if x.is_floating_point() else torch.int64)
    if x.dim() == 0:
        return x.to(result)
    size = x.shape[dim]
    row = torch.arange(size, device=x.device)
    ones = (row[:, None] >= row[None]).to(torch.float32)
    wide = x.to(torch.float32).movedim(dim, -1)
    flat = torch.mm(wide.reshape(-1, size), ones.t())
    return flat.reshape(wide.shape).movedim(-1, dim).to(result)


def _roll(x: torch.Tensor, shifts: list[int], dims: list[int] = []) -> Any:  # noqa: B006
    """Turn one dimension around by a known number of places: two slices of any size."""
    if len(shifts) != 1 or len(dims) != 1 or not isinstance(shifts[0], int):
        return NotImplemented
    dim, shift = dims[0], shifts[0]
    size = x.shape[dim]
    if isinstance(size, int):
        shift = shift % max(size, 1)
    if abs(shift) > 1 and not isinstance(size, int):
        return NotImplemented  # a shorter sequence would turn around more than once
    if not shift:
        return x.clone()
    places = (torch.arange(size, device=x.device) + (size - shift)) % size
    return x.index_select(dim, places)


def _group_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    batch: Any,
    channels: Any,
    rest: Any,
    groups: int,
    eps: float,
) -> Any:
    """Normalise each of `groups` parts of [N, C, ...], the dimensions behind C included."""
    flat = x.reshape(batch, groups, -1)
    mean = flat.mean(2, keepdim=True)
    centred = flat - mean
    scale = torch.rsqrt((centred * centred).mean(2, keepdim=True) + eps)
    result = (centred * scale).reshape(x.shape)
    return _affine(result, weight, bias), mean.reshape(batch, -1), scale.reshape(batch, -1)


def _batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    momentum: float,
    eps: float,
) -> Any:
    """Normalise by the stored mean and variance of each channel."""
    centred = x - _of_channels(mean, x)
    result = centred * _of_channels(torch.rsqrt(variance + eps), x)
    none = x.new_empty(0)
    return _affine(result, weight, bias), none, none


def _affine(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Any:
    x = x if weight is None else x * _of_channels(weight, x)
    return x if bias is None else x + _of_channels(bias, x)


def _of_channels(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return value.reshape([-1, *[1] * (x.dim() - 2)])


def conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Convolve [N, C, L] as a sum of products with shifted inputs; weight: [O, C / groups, K].

    It stands for F.conv1d while a model is traced: on fake tensors the operator fixes L. Raises
    NotImplementedError for strides and for padding by name.
    """
    strides, pads, steps = (
        x if isinstance(x, tuple) else (x,) for x in (stride, padding, dilation)
    )
    if strides != (1,) or isinstance(pads[0], str) or input.dim() != 3:
        raise NotImplementedError(f"conv1d with stride={stride} and padding={padding!r}")
    (pad,), (step,), (out, inner, taps) = pads, steps, weight.shape
    padded = F.pad(input, (pad, pad)) if pad else input
    length = input.shape[2] + 2 * pad - step * (taps - 1)
    grouped = padded.reshape(input.shape[0], groups, inner, -1)
    kernels = weight.reshape(1, groups, out // groups, inner, taps)
    result: Any = 0.0 if bias is None else bias[:, None]
    for tap in range(taps):
        piece = grouped[..., tap * step : tap * step + length]
        if inner == 1:
            term = piece * kernels[..., 0, tap][..., None]
        else:
            term = (piece.transpose(2, 3) @ kernels[..., tap].transpose(2, 3)).transpose(2, 3)
        result = result + term.flatten(1, 2)
    return result  # type: ignore[no-any-return]


OWN: dict[Any, Callable[..., Any]] = {
    aten.bmm.default: _outer_product,
    aten.mm.default: _outer_product,
    aten.native_group_norm.default: _group_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.roll.default: _roll,
    aten.cumsum.default: _cumsum,
    aten.copy.default: _copy,
    aten.max.default: lambda x: x.reshape(-1).amax(0),
    aten.min.default: lambda x: x.reshape(-1).amin(0),
}
