"""Error-compensated quantisation: GPTQ (Frantar et al., 2022, arXiv:2210.17323, algorithm 1).

Columns are quantised one after another; what a column's rounding does to the layer's outputs is
taken back, as far as the calibration activations allow, by the columns that are still free. The
grid of a group is searched when its first column is reached, on the weights as compensated so far.
Columns stay in their order (no act-order): kernels need groups of neighbouring columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aios_compile.quantize.scheme import Quantized, Scheme, best_grid, codes_of, round_to_nearest

BLOCK = 128  # columns whose effect on the rest is applied at once; a multiple of every group
DAMPING = 0.01  # of the mean diagonal, the paper's; more where that is not positive definite


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Quantized:
    """Quantise weight float32 [N, K] for inputs x with mean x x^T = hessian float64 [K, K].

    Rounding to nearest stays where it is the better of the two on these inputs.
    """
    importance = hessian.diagonal().float()
    plain = round_to_nearest(weight, importance, scheme)
    factor = _factor(hessian)
    if factor is None:
        return plain
    compensated = _compensated(weight.clone(), importance, factor.float(), scheme)
    errors = [output_error(weight, q.values(), hessian) for q in (plain, compensated)]
    return compensated if errors[1] <= errors[0] else plain


def output_error(weight: Tensor, instead: Tensor, hessian: Tensor) -> float:
    """Return how far x @ instead.T is from x @ weight.T, relative, root mean square over inputs."""
    off, whole = (instead - weight).double(), weight.double()
    lost = ((off @ hessian) * off).sum()
    return float((lost / ((whole @ hessian) * whole).sum().clamp_min(1e-300)).clamp_min(0).sqrt())


def _factor(hessian: Tensor) -> Tensor | None:
    """Return the upper Cholesky factor of the inverse of the damped Hessian."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return None  # no input ever arrived
    damping = DAMPING
    while damping < 1:
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not info:
            factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return factor
        damping *= 10
    return None


def _compensated(w: Tensor, importance: Tensor, factor: Tensor, scheme: Scheme) -> Quantized:
    rows, depth = w.shape
    codes = torch.empty(rows, depth, dtype=torch.uint8)
    scales = torch.empty(rows, depth // scheme.group, dtype=scheme.scales)
    zeros = torch.empty(rows, depth // scheme.group, dtype=torch.uint8)
    for begin in range(0, depth, BLOCK):
        end = min(begin + BLOCK, depth)
        off = torch.empty(rows, end - begin)
        for column in range(begin, end):
            group, place = divmod(column, scheme.group)
            if place == 0:
                part = slice(column, column + scheme.group)
                scales[:, group], zeros[:, group] = best_grid(w[:, part], importance[part], scheme)
            scale, zero = scales[:, group], zeros[:, group]
            code = codes_of(w[:, column, None], scale, zero, scheme)[:, 0]
            codes[:, column] = code.to(torch.uint8)
            value = (code - zero.float()) * scale.float()
            off[:, column - begin] = (w[:, column] - value) / factor[column, column]
            w[:, column:end] -= off[:, column - begin, None] * factor[column, None, column:end]
        w[:, end:] -= off @ factor[begin:end, end:]
    return Quantized(codes, scales, zeros)
