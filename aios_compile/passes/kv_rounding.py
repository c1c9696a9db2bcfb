"""What rounding the KV cache to codes may change: the yardstick of quantize_kv's certificate.

A code is off by at most half a step: of int8 max|x| / 254 of its head, of e4m3 half of the number's
own last bit. The program *before* the pass, with every key and value moved by exactly that, each up
or down at random, shows what such an error does to the results of this model; real rounding errors
lie between the two and are 0.58 of them on average.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule, placeholders
from aios_compile.ir.quantized import LARGEST_CODE, quantize_groups

aios = torch.ops.aios
LEAST_EXPONENT = -6  # of a normal e4m3 number; the smaller ones have its step
MANTISSA_BITS = 3


def rounded_dtype(before: IRModule, after: IRModule) -> torch.dtype | None:
    """Return the codes' dtype if the program after keeps its KV cache in codes and the one before
    does not, else None.
    """
    return _codes(after) if _codes(before) is None else None


def _codes(module: IRModule) -> torch.dtype | None:
    holders = [n for n in placeholders(module.root.graph) if n.name in module.states]
    found = (n.meta["val"].dtype for n in holders)
    return next((dtype for dtype in found if dtype in LARGEST_CODE), None)


def half_a_step_off(x: Tensor, dtype: torch.dtype, sequence: int) -> Tensor:
    """Return x [T, G, D] with each element moved by half a step of its code, up or down."""
    generator = torch.Generator().manual_seed(sequence)
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
    codes, scales = quantize_groups(x, dtype, exact=True)
    half = torch.full_like(codes, 0.5)
    if dtype != torch.int8:
        exponents = codes.abs().log2().floor().clamp_min(LEAST_EXPONENT)
        half = torch.exp2(exponents - MANTISSA_BITS - 1)
    return x + signs * half * scales.unsqueeze(-1)


def moved(module: IRModule, dtype: torch.dtype) -> IRModule:
    """Return a copy of a paged program whose keys and values are half a step of codes in dtype off
    when written.
    """
    copy = snapshot.take(module)
    for graph_module in copy.graphs().values():
        graph = graph_module.graph
        for i, write in enumerate(
            graph.find_nodes(op="call_function", target=aios.kv_write.default)
        ):
            with graph.inserting_before(write):
                off: list[fx.Node] = [
                    graph.call_function(half_a_step_off, (write.args[j], dtype, 2 * i + j))
                    for j in range(2)
                ]
            write.args = (*off, *write.args[2:])
    return copy
