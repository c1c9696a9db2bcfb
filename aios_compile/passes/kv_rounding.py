"""What rounding the KV cache to int8 may change: the yardstick of quantize_kv's certificate.

A code is off by at most half a step, max|x| / 254 of its head. The program *before* the pass, with
every key and value moved by exactly that, each up or down at random, shows what such an error does
to the results of this model; real rounding errors lie between the two and are 0.58 of them on
average.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule, placeholders

aios = torch.ops.aios


def rounds_kv(before: IRModule, after: IRModule) -> bool:
    """Return whether the program after keeps its KV cache as int8 and the one before does not."""
    return _has_codes(after) and not _has_codes(before)


def _has_codes(module: IRModule) -> bool:
    holders = [n for n in placeholders(module.root.graph) if n.name in module.states]
    return any(n.meta["val"].dtype == torch.int8 for n in holders)


def half_a_step_off(x: Tensor, sequence: int) -> Tensor:
    """Return x [T, G, D] with each element moved by max|x| / 254 of its head, up or down."""
    generator = torch.Generator().manual_seed(sequence)
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
    return x + signs * (x.abs().amax(-1, keepdim=True) / 254)


def moved(module: IRModule) -> IRModule:
    """Return a copy of a paged program whose keys and values are half a step off when written."""
    copy = snapshot.take(module)
    for graph_module in copy.graphs().values():
        graph = graph_module.graph
        for i, write in enumerate(
            graph.find_nodes(op="call_function", target=aios.kv_write.default)
        ):
            with graph.inserting_before(write):
                off: list[fx.Node] = [
                    graph.call_function(half_a_step_off, (write.args[j], 2 * i + j))
                    for j in range(2)
                ]
            write.args = (*off, *write.args[2:])
    return copy
