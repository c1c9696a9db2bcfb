"""One token a row: logprobs, masks, penalties and a seeded Gumbel-max draw over logits[R, V].

The definition is ir/sample_reference.py. Layouts: logits float32 (any row stride), the inputs of
`aios::sample` one value a row, lists in one array with row starts; outputs as in the op. Bytes: a
row is read from the cache a few times (maximum, sum, choice, rank). Items: rows. Scratch: one float
a vocabulary entry on the thread's stack, for rows that are not plainly greedy.
Algorithms: top-k and top-p by radix selection instead of sorting; Gumbel-max (Gumbel, 1954) with
Philox4x32-10 (Salmon et al., SC 2011), skipping tokens that no noise can make win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.codegen.access import outputs
from aios_compile.codegen.cpp.template import constants, kernel, number, pointer
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import Strided, body_lines, resolve
from aios_compile.ir.sample_op import INPUTS, MAX_LOGPROBS

OUTPUTS = ("sampled_ids", "logprobs", "ranks", "top_ids", "top_logprobs", "finite")


@dataclass(frozen=True)
class SampleSpec:
    """Everything the text depends on. `inputs`: logits, then the op's other inputs in order."""

    inputs: tuple[Strided, ...]
    outputs: tuple[tuple[int, Operand], ...]
    lines: tuple[str, ...] = ()


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> SampleSpec | None:
    """Return the spec of a body that is one aios.sample whose six results are its outputs."""
    results: list[Any] = outputs(body)
    nodes = {r.args[0] if isinstance(r, fx.Node) and r.args else None for r in results}
    node = nodes.pop() if len(nodes) == 1 and len(results) == len(OUTPUTS) else None
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aios.sample.default:
        return None
    if [r.args[1] for r in results] != list(range(len(OUTPUTS))):
        return None
    views = [resolve(argument, operands) for argument in node.args]
    if any(v is None or v.operand.strides[-1] != 1 for v in views):
        return None
    first = len(operands) - len(OUTPUTS)
    outs = tuple((first + i, operands[first + i]) for i in range(len(OUTPUTS)))
    spec = SampleSpec(tuple(v for v in views if v is not None), outs, body_lines(body))
    return spec if spec.inputs[0].operand.dtype == "f32" else None


def reference(spec: SampleSpec, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Compute the outputs in eager PyTorch."""
    return tuple(torch.ops.aios.sample.default(*tensors))


def emit(spec: SampleSpec) -> KernelSource:
    """Return the kernel's text."""
    logits = spec.inputs[0]
    rows, vocabulary = logits.operand.shape
    assert isinstance(vocabulary, int), "the vocabulary has a fixed size"
    definitions = [
        constants(VOCABULARY=vocabulary, MAX_LOGPROBS=MAX_LOGPROBS),
        number("num_rows", rows),
    ]
    for name, view in zip(("logits", *INPUTS), spec.inputs):
        definitions.append(pointer(f"{name}_at", view.index, view.operand, ("i",), view.offset))
    for name, (index, operand) in zip(OUTPUTS, spec.outputs):
        definitions.append(pointer(f"{name}_at", index, operand, ("i",)))
    count = spec.outputs[-1][0] + 1
    return kernel("sample", spec, definitions, count, lines=spec.lines)
