"""The K largest or smallest of each row, in order, and where they stood; K = N is a stable sort.

Equal values keep their order, the lowest index first; a NaN counts as larger than every number,
as in torch. Layout: input any strides, the chosen dimension anywhere; values and indices likewise,
either may be missing. Bytes: the row once. Items: rows (all other dimensions). The K best so far
stay sorted on the thread's stack and a value enters by binary search, so a row costs N compares
and about K log(N / K) insertions: right for routers, where K is 1 to 8, and sound for a sort.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.codegen.access import outputs
from aios_compile.codegen.cpp.template import C_TYPES, constants, kernel, number, offset_text
from aios_compile.codegen.operand import Dim, Operand, dim_text, dim_value, multiply
from aios_compile.codegen.reference import infer_sizes
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import Strided, body_lines, resolve

aten = torch.ops.aten
SORTS = (aten.sort.default, aten.sort.stable)
MAX_K = 1 << 15  # 12 bytes each on the thread's stack
VALUES, INDICES = 0, 1
NAMES = ("values", "indices")


@dataclass(frozen=True)
class TopkSpec:
    """Everything the text depends on. outputs: (VALUES or INDICES, operand index, operand)."""

    source: Strided
    outputs: tuple[tuple[int, int, Operand], ...]
    dim: int
    k: int
    largest: bool
    lines: tuple[str, ...] = ()


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> TopkSpec | None:
    """Return the spec of a body whose outputs are results of one topk or sort, else None."""
    results: list[Any] = outputs(body)
    if any(r.target is not operator.getitem for r in results):
        return None
    nodes = {r.args[0] for r in results}
    node = nodes.pop() if len(nodes) == 1 else None
    if not isinstance(node, fx.Node) or node.target not in (aten.topk.default, *SORTS):
        return None
    source = resolve(node.args[0], operands)
    if source is None or source.operand.dtype not in C_TYPES or not source.operand.shape:
        return None
    dim, largest = _order(node)
    dim %= len(source.operand.shape)
    k = source.operand.shape[dim] if node.target in SORTS else node.args[1]
    if not isinstance(k, int) or not 0 < k <= MAX_K:
        return None
    first = len(operands) - len(results)
    outs = tuple((r.args[1], first + i, operands[first + i]) for i, r in enumerate(results))
    return TopkSpec(source, outs, dim, k, largest, body_lines(body))


def _order(node: fx.Node) -> tuple[int, bool]:
    """Return the dimension of a topk or sort, and whether the largest come first."""
    target: Any = node.target
    arguments = target._schema.arguments
    given = {a.name: a.default_value for a in arguments}
    given |= {**dict(zip((a.name for a in arguments), node.args)), **node.kwargs}
    return int(given["dim"]), bool(given.get("largest", given.get("descending")))


def reference(spec: TopkSpec, x: Tensor) -> list[Tensor]:
    """Compute the outputs in torch; x is the whole operand, of which the spec may see a part."""
    source, sizes = spec.source, infer_sizes([spec.source.operand], [x])
    shape, strides = source.operand.shape, source.operand.strides
    view = x.as_strided(
        [dim_value(d, sizes) for d in shape],
        [dim_value(d, sizes) for d in strides],
        x.storage_offset() + dim_value(source.offset, sizes),
    )
    found = torch.sort(view, dim=spec.dim, descending=spec.largest, stable=True)
    return [found[which].narrow(spec.dim, 0, spec.k) for which, _, _ in spec.outputs]


def emit(spec: TopkSpec) -> KernelSource:
    """Return the kernel's text."""
    operand, dim = spec.source.operand, spec.dim
    outer = (*operand.shape[:dim], *operand.shape[dim + 1 :])
    given = {which for which, _, _ in spec.outputs}
    rows: Dim = 1
    for size in outer:
        rows = multiply(rows, size)
    definitions = [
        f"using Stored = {C_TYPES[operand.dtype]};",
        constants(
            K=spec.k,
            LARGEST=spec.largest,
            HAS_VALUES=VALUES in given,
            HAS_INDICES=INDICES in given,
        ),
        number("num_rows", rows),
        number("row_size", operand.shape[dim]),
        *_row("input", spec.source.index, operand, dim, outer, spec.source.offset),
    ]
    places = {which: (index, out) for which, index, out in spec.outputs}
    for which, name in enumerate(NAMES):
        index, out = places.get(which, (spec.outputs[0][1], spec.outputs[0][2]))
        definitions += _row(name, index, out, dim, outer)
    last = max(index for _, index, _ in spec.outputs)
    return kernel("topk", spec, definitions, last + 1, lines=spec.lines)


def _row(
    name: str, index: int, operand: Operand, dim: int, outer: Sequence[Dim], offset: Dim = 0
) -> list[str]:
    """Return the C functions `<name>_row(n, p, row)`, a row's first element, and `<name>_step`."""
    strides = (*operand.strides[:dim], *operand.strides[dim + 1 :])
    kind, steps, coordinates = C_TYPES[operand.dtype], "", []
    for d in reversed(range(len(outer))):
        coordinates.append(f"i{d}")
        rest = "row" if d == len(outer) - 1 else f"r{d + 1}"
        cut = rest if d == 0 else f"{rest} % {dim_text(outer[d])}"
        steps += f"  const int64_t i{d} = {cut};\n"
        steps += f"  const int64_t r{d} = {rest} / {dim_text(outer[d])};\n" if d else ""
    text = offset_text(strides, coordinates[::-1], offset)
    unused = "".join(f"  (void){c};\n" for c in coordinates)
    return [
        f"AIOS_INLINE {kind}* {name}_row(const Sizes* n, void* const* p, int64_t row) {{\n"
        f"  (void)n;\n  (void)row;\n{steps}{unused}  return ({kind}*)p[{index}] + {text};\n}}",
        number(f"{name}_step", operand.strides[dim]),
    ]
