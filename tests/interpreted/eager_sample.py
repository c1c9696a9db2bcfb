"""A stand-in emitter for aios.sample: a module that computes it in eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.frame import POINTERS

TEXT = """\
import torch
from aios_compile.ir import ops

assert ops.TABLE
LISTS = ("penalty_ids", "penalty_counts", "bias_ids", "bias_values", "allowed_ids")
NAMES = {names}
TYPES = {types}
VOCABULARY = {vocabulary}


class Eager:
    __name__ = "aios_sample"

    def __getitem__(self, grid):
        return self.run

    def run(self, *operands, **sizes):
        rows = sizes["R"]
        given = []
        for name, x in zip(NAMES, operands):
            if name == "logits":
                x = x[: rows * VOCABULARY].view(rows, VOCABULARY)
            elif name.endswith("_starts"):
                x = last = x[: rows + 1]
            else:
                x = x[: int(last[-1])] if name in LISTS else x[:rows]
            given.append(x)
        results = torch.ops.aios.sample.default(*given)
        for out, result in zip(operands[len(NAMES) :], results):
            out[: result.numel()] = result.reshape(-1)


VARIANTS = (dict(most=None, launches=(dict(kernel=Eager(), constexprs={{}}, options={{}}),)),)


def launch(operands, **sizes):
    VARIANTS[0]["launches"][0]["kernel"][(1,)](*operands, **sizes)
"""


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> Any:
    """Return the names of the sampler's inputs, if the body is a sampler."""
    nodes = [n for n in body.graph.nodes if n.target is torch.ops.aios.sample.default]
    if not nodes:
        return None
    names = [a.name for a in torch.ops.aios.sample.default._schema.arguments]
    return names, tuple(operands)


def emit(spec: Any) -> KernelSource:
    """Return the stand-in module."""
    names, operands = spec
    text = TEXT.format(
        names=names,
        types=tuple(POINTERS[o.dtype] for o in operands),
        vocabulary=operands[0].shape[1],
    )
    return KernelSource("sample", "aios_sample", "triton", text, len(operands))
