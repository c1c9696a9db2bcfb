"""Activation-aware scaling: AWQ (Lin et al., 2023, arXiv:2306.00978).

Input channels with large activations get larger weights, and so smaller relative rounding errors;
what produces the channels is divided by the same factors, so that the model computes the same
function: a norm's weights before q, k, v or gate, up; the rows of up before down; the rows of v
before o where each query head has a value head of its own. The exponent is searched by the error
of the outputs on the calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from aios_compile.quantize.gptq import output_error
from aios_compile.quantize.scheme import Scheme, round_to_nearest

SEARCH_ROWS = 128  # of each matrix, spread evenly: the exponent is one number for all rows
EXPONENTS = tuple(i / 10 for i in range(11))
NORMS = {  # what produces the channels -> the linears that read them
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
ROWS = {"mlp.up_proj": ("mlp.down_proj",), "self_attn.v_proj": ("self_attn.o_proj",)}


def scale_channels(
    layer: nn.Module, hessians: Mapping[str, Tensor], scheme: Scheme, stored: torch.dtype
) -> None:
    """Rescale the channels between the parts of a decoder layer, in place.

    hessians: mean x x^T of each linear's inputs, float64. stored: the dtype that norms are written
    in: factors are what the rounded norm makes of them, so that nothing is lost by it. The Hessians
    are those before scaling; they are rescaled in place too.
    """
    parts = dict(layer.named_modules())
    for producer, names in (*NORMS.items(), *ROWS.items()):
        linears = [parts[name] for name in names]
        source = parts[producer].weight
        assert isinstance(source, Tensor)
        if source.shape[0] != linears[0].weight.shape[1]:
            continue  # value heads are shared by several query heads
        if any(linear.weight.shape[1] % scheme.group for linear in linears):
            continue
        weights = [linear.weight.data for linear in linears]
        factors = _search(weights, hessians[names[0]], scheme)
        if producer in NORMS:
            divided = (source.data / factors).to(stored).float()
            factors = torch.where(divided != 0, source.data / divided, 1.0)
            source.data = torch.where(divided != 0, divided, source.data)
        else:
            source.data = source.data / factors[:, None]
            bias = getattr(parts[producer], "bias", None)
            if bias is not None:
                bias.data = bias.data / factors
        for linear in linears:
            linear.weight.data = linear.weight.data * factors
        for hessian in {id(hessians[name]): hessians[name] for name in names}.values():
            hessian.copy_(_scaled(hessian, factors))  # linears of one input share it


def _search(weights: Sequence[Tensor], hessian: Tensor, scheme: Scheme) -> Tensor:
    """Return the factor of each channel, float32 [K], that loses least of the outputs."""
    size = hessian.diagonal().sqrt().float().clamp_min(1e-8)
    best, least = torch.ones_like(size), float("inf")
    for exponent in EXPONENTS:
        factors = size.pow(exponent)
        factors = factors / (factors.max() * factors.min()).sqrt()
        scaled = _scaled(hessian, factors)
        importance = scaled.diagonal().float()
        lost = 0.0
        for weight in weights:
            picked = torch.linspace(0, len(weight) - 1, min(len(weight), SEARCH_ROWS)).long()
            wide = weight[picked] * factors
            instead = round_to_nearest(wide, importance, scheme).values()
            lost += output_error(wide, instead, scaled) ** 2
        if lost < least:
            best, least = factors, lost
    return best


def _scaled(hessian: Tensor, factors: Tensor) -> Tensor:
    """Return the Hessian of inputs divided by factors."""
    inverse = 1 / factors.double()
    return hessian * inverse[:, None] * inverse[None, :]
