"""y[t, n] = f(sum over k of x[t, k] * w[n, k], ...) with weights quantised to 8 or 4 bits.

w: rows of codes, scales and minimums (codegen/planar.py), dequantised in registers; x, tail and
outputs as in linear.py. Activations are not quantised: the sums are those of the float64 oracle to
float32's precision (the CPU kernel rounds activations to 8 bits). rows: one token on the
vector units; a thread's four or eight codes meet their activations, the sum takes the scale once.
tiles: the weights as two bfloat16 parts on the tensor cores, 16 bits of mantissa, and so are
float32 activations.
Bytes: codes, scales and minimums once for each tile of tokens; a load of a tile's codes is 16
bytes, of one token's 4, with 128 side by side in a warp. Grid: one program for BLOCK_N columns of
1, 16, 32 or 64 tokens, and up to 32 tokens several that share the depth (split_depth.py); 2 to 32
tokens have the same steps and parts, so a row has the same bits whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.codegen.access import outputs
from aios_compile.codegen.cpp.quantized_linear import bias_and_order
from aios_compile.codegen.naming import layout, symbol_of, variable
from aios_compile.codegen.operand import BYTES, Operand
from aios_compile.codegen.plane import PREFIX, Plane, plane_of
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import Strided, resolve
from aios_compile.codegen.triton import (
    candidate_variants,
    choice,
    linear_spec,
    quantized_configs,
    split_depth,
)
from aios_compile.codegen.triton.candidate_variants import Others, candidates
from aios_compile.codegen.triton.cards import DEFAULT, Card
from aios_compile.codegen.triton.choice import Choice, Tuning
from aios_compile.codegen.triton.configs import Config, Problem
from aios_compile.codegen.triton.dependent_launch import prefetch_rows
from aios_compile.codegen.triton.frame import Launch, module_text, python_dim
from aios_compile.codegen.triton.linear_spec import FLOATS, LinearSpec
from aios_compile.codegen.triton.linear_text import (
    PRODUCT,
    kernel_text,
    tile_lines,
    two_parts,
    x_row,
)
from aios_compile.codegen.triton.norm_prologue import finish_lines, gain_lines, scaled
from aios_compile.codegen.triton.quantized_configs import STRIP
from aios_compile.codegen.triton.split_depth import Shared
from aios_compile.ir.quant_format import QuantFormat

DTYPES = {"f32": "tl.float32", "bf16": "tl.bfloat16", "f16": "tl.float16"}


@dataclass(frozen=True)
class QuantizedLinearSpec:
    """A linear's spec (its weight operand are the packed rows), and the layout of a row.

    order: the column of each value of a row, where columns were sorted by group.
    """

    linear: LinearSpec
    plane: Plane
    order: Strided | None = None


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> QuantizedLinearSpec | None:
    """Return the spec of a linear on rows of whole numbers and a pointwise tail, else None."""
    spec = read_spec(body, operands)
    return None if spec is None or spec.plane.is_float else spec


def read_spec(body: fx.GraphModule, operands: Sequence[Operand]) -> QuantizedLinearSpec | None:
    """Return the spec of a body of one aios.quantized_linear and a pointwise tail, else None."""
    target = torch.ops.aios.quantized_linear.default
    nodes = [n for n in body.graph.nodes if n.target is target]
    if len(nodes) != 1 or not all(isinstance(r, fx.Node) for r in outputs(body)):
        return None
    form = QuantFormat.parse(str(nodes[0].args[2]))
    source = linear_spec.x_of(nodes[0].args[0], operands)
    weight = resolve(nodes[0].args[1], operands)
    if source is None or weight is None or weight.operand.packed != PREFIX + form.name:
        return None
    x, norm = source
    depth, dense = x.operand.shape[1], x.operand.strides[1] == 1
    if not dense or not isinstance(depth, int) or depth % 32 or x.operand.dtype not in FLOATS:
        return None
    bias, order = bias_and_order(nodes[0])
    columns = resolve(order, operands)
    if order is not None and (columns is None or form.is_float):
        return None
    spec = linear_spec.with_tail(body, operands, nodes[0], bias, x, weight, norm)
    return None if spec is None else QuantizedLinearSpec(spec, plane_of(form, depth), columns)


def reference(spec: QuantizedLinearSpec, body: fx.GraphModule, *tensors: Tensor) -> Any:
    """Compute the outputs in eager PyTorch from rows that are not packed: the definition."""
    return body(*tensors)


def problem_of(spec: QuantizedLinearSpec) -> Problem:
    """Return the sizes that the cost model needs; x has as many parts as products."""
    base, plane = spec.linear, spec.plane
    x = base.x.operand.dtype
    return Problem(
        base.columns, base.depth, base.streams, plane.row_bytes / base.depth, BYTES[x],
        2 if x == "bf16" else 3, base.norm is not None,
    )  # fmt: skip


def choices(
    spec: QuantizedLinearSpec, card: Card = DEFAULT, tuning: Tuning | None = None
) -> list[Choice]:
    """Return the choice for each range of rows; tuning: with what the compiler reports."""
    problem = problem_of(spec)
    found = quantized_configs.ranges(problem, strip_codes(spec.plane), card)
    build = partial(_alone, spec, card)
    return choice.choose(problem, card, tuning, build, found, "quantized_linear")


def _alone(spec: QuantizedLinearSpec, card: Card, config: Config) -> KernelSource:
    return emit(spec, card, ((None, config),))


def emit(
    spec: QuantizedLinearSpec, card: Card = DEFAULT,
    chosen: Sequence[tuple[int | None, Config]] | None = None,
    tuning: Tuning | None = None,
) -> KernelSource:  # fmt: skip
    """Return the module. chosen: overrides the choice; tuning: asks the compiler about it."""
    base, plane = spec.linear, spec.plane
    symbol = symbol_of("quantized_linear", (spec, chosen, card.target, card.warps))
    reasons: list[str] = []
    others: Others = {}
    if chosen is None:
        made = choices(spec, card, tuning)
        chosen, reasons = [(c.most, c.config) for c in made], [c.text() for c in made]
        others = {c.most: c.others for c in made}
    shared = [_shared(base, config) for config in candidate_variants.used(chosen, others)]
    workspace, counters = split_depth.workspace(base, shared), split_depth.counters(shared)
    operands = [*base.operands, *workspace, *split_depth.counter_operand(counters)]
    parts, variants = candidate_variants.variants(
        symbol, chosen, others, partial(_variant, spec, operands, card)
    )
    comment = [f"quantized_linear: {plane.bits} bits by {plane.group}, {sizes_text(base)}"]
    comment += [f"  {layout(o)}" for o in operands] + [f"chosen for {x}" for x in reasons]
    comment += [f"model: {x}" for x in base.lines]
    rows = base.x.operand.shape[0]
    text = module_text(comment, operands, [PRODUCT, *parts], variants, rows, workspace)
    return KernelSource(
        "quantized_linear", symbol, "triton", text, len(base.operands), linear_spec.inplace(base),
        base.lines, tuple(workspace), counters,
        candidates=candidates(others, problem_of(spec).signature("quantized_linear")),
    )  # fmt: skip


def _variant(
    spec: QuantizedLinearSpec, operands: list[Operand], card: Card, config: Config, name: str
) -> tuple[list[str], tuple[Launch, ...]]:
    """Return the kernel function of a configuration and its launch."""
    depth, strips = _shared(spec.linear, config), config.block_k // strip_codes(spec.plane)
    sizes = [("BLOCK_N", config.block_n), ("STRIPS", strips), ("SPLIT", config.split)]
    grid = str(depth.tiles * config.split)
    if config.kind == "rows":
        ends = spec.linear.depth // strip_codes(spec.plane) % strips == 0
        body = _rows(spec, operands, depth, card, config.block_n, whole=ends)
    else:
        body = _tiles(spec, operands, depth, card)
        sizes = [("BLOCK_T", config.block_t), *sizes]
        if config.kind == "tile":
            rows = python_dim(spec.linear.x.operand.shape[0])
            grid = f"(({rows} + {config.block_t - 1}) // {config.block_t}) * {depth.tiles}"
    text = kernel_text(name, operands, tuple(n for n, _ in sizes), body)
    return [text], (Launch(name, grid, tuple(sizes), config.num_warps, config.num_stages),)


def _shared(base: LinearSpec, config: Config) -> Shared:
    tiles = -(-base.columns // config.block_n)
    return Shared(config.split, tiles, config.block_t, base.norm is not None)


def sizes_text(base: LinearSpec) -> str:
    """Return the sizes in words, by which the kernels of a layer differ."""
    return f"{base.depth} inputs for {base.streams} x {base.columns} columns"


def strip_codes(plane: Plane) -> int:
    """Return the codes of 16 bytes."""
    return STRIP * (8 // plane.bits)


def _halves(plane: Plane) -> range:
    """Return the codes of a byte: a strip is 16 k a half."""
    return range(8 // plane.bits)


def weight_lines(spec: QuantizedLinearSpec, stream: int) -> list[str]:
    """Return the lines that set the pointers of a stream's codes, scales and minimums."""
    base, plane = spec.linear, spec.plane
    weight = variable(base.weight.operand, base.weight.index)
    first = stream * base.columns
    lines = [f"row{stream} = {weight} + (column + {first}) * {plane.row_bytes}"]
    for name, begin, dtype in (
        ("scales", plane.scale_begin, plane.scale_dtype),
        ("minimums", plane.minimum_begin, plane.minimum_dtype),
    ):
        if dtype:
            pointer = f"tl.pointer_type({DTYPES[dtype]})"
            lines.append(f"{name}{stream} = (row{stream} + {begin}).to({pointer})")
    return lines


def prefetch_codes(spec: QuantizedLinearSpec, depth: Shared, card: Card, columns: int) -> list[str]:
    """Return the lines that fetch a program's rows into L2 before it waits for its inputs."""
    base, size = spec.linear, spec.plane.row_bytes
    if not card.dependent_launch:
        return []
    weight = variable(base.weight.operand, base.weight.index)
    own = f"tl.minimum(i1, {base.columns - 1})[:, None]"
    rows = [f"{weight} + ({own} + {s * base.columns}) * {size}" for s in range(base.streams)]
    return prefetch_rows(rows, size, 1, columns, depth.split)


def _affine(spec: QuantizedLinearSpec, stream: int, half: int) -> list[str]:
    """Return the lines that load `scale` and `shift` of a half's strips: w = u * scale + shift."""
    plane, count = spec.plane, len(_halves(spec.plane))
    place = f"(strip * {STRIP * count} + {STRIP * half}) // {plane.group}"
    lines = [f"group = {place}"]
    mask = "mask=inside, other=0.0"
    lines.append(f"scale = tl.load(scales{stream} + group, {mask}).to(tl.float32)")
    lines.append(f"shift = {float(plane.low)} * scale")
    if plane.minimum_dtype:
        lines.append(f"shift -= tl.load(minimums{stream} + group, {mask}).to(tl.float32)")
    return lines


def _order_lines(spec: QuantizedLinearSpec, mask: str) -> list[str]:
    """Return the line from the places of values in a row to those in x, where they differ."""
    if spec.order is None:
        return []
    columns = variable(spec.order.operand, spec.order.index)
    return [f"place = tl.load({columns} + place{mask})"]


def _numbers(plane: Plane, card: Card) -> list[str]:
    """Return the lines from `codes` to u0 and, of half bytes, u1: the codes as float32."""
    if plane.bits == 8:
        return ["u0 = codes.to(tl.float32)"]
    return [f"u0, u1 = nibbles(codes, {card.target.startswith('cuda')})"]


def _rows(
    spec: QuantizedLinearSpec, operands: list[Operand], depth: Shared, card: Card, columns: int,
    whole: bool,
) -> list[str]:  # fmt: skip
    """Return the body for one token; codes are blocks [BLOCK_N, STRIPS, 4, 4].

    columns: BLOCK_N. whole: no step goes beyond the end. A thread has four codes in a row and the
    activations that they meet, 16 bytes: with 16 codes a thread, Triton moves codes or activations
    between threads in every step (20 barriers on sm_90). The lanes of a warp read 128 bytes of a
    row's codes in one go. A sum of four takes the scale; nothing is exchanged before the end.
    """
    base, plane = spec.linear, spec.plane
    streams, count = range(base.streams), len(_halves(plane))
    strips = base.depth // (STRIP * count)
    lines = [
        *split_depth.begin_lines(depth.split),
        "i0 = tl.full([1], 0, tl.int64)",
        f"mask0 = i0 < {python_dim(base.x.operand.shape[0])}",
        "i1 = item * BLOCK_N + tl.arange(0, BLOCK_N)",
        f"mask1 = i1 < {base.columns}",
        f"column = tl.minimum(i1, {base.columns - 1})[:, None, None, None]",
        "quarter = tl.arange(0, 4)[None, None, :, None]",
        "byte = 4 * quarter + tl.arange(0, 4)[None, None, None, :]",
        f"x = {x_row(base, '0')}",
    ]
    for s in streams:
        lines += [*weight_lines(spec, s), f"sums{s} = tl.zeros([BLOCK_N, STRIPS, 4], tl.float32)"]
    lines += ["squares = tl.zeros([1, STRIPS, 4], tl.float32)"] if base.norm else []
    lines += prefetch_codes(spec, depth, card, columns)
    first, step = split_depth.steps(depth.split, "STRIPS")
    lines += [f"for start in range({first}, {strips}, {step}):"]
    inner = ["strip = start + tl.arange(0, STRIPS)[None, :, None, None]"]
    inner += [] if whole else [f"inside = strip < {strips}"]
    mask = "" if whole else ", mask=inside, other=0.0"
    for h in _halves(plane):
        inner.append(f"place = strip * {STRIP * count} + {STRIP * h} + byte")
        inner += _order_lines(spec, mask.replace("0.0", "0"))
        inner.append(f"x{h} = tl.load(x + place{mask}).to(tl.float32)")
        if base.norm:
            inner.append(f"squares += tl.sum(x{h} * x{h}, 3)")
            inner += gain_lines(base, "place", mask)
            inner.append(f"x{h} = {scaled(base, f'x{h}')}")
        inner.append(f"total{h} = tl.sum(x{h}, 3)")
    for s in streams:
        load = f"row{s} + strip * {STRIP} + byte{mask}".replace("0.0", "0")
        inner.append(f'codes = tl.load({load}, eviction_policy="evict_first")')
        inner += _numbers(plane, card)
        for first_half, last_half in _sharing(plane):
            halves = range(first_half, last_half + 1)
            inner += _scales_of(spec, s, first_half, mask)
            product = " + ".join(f"u{h} * x{h}" for h in halves)
            total = " + ".join(f"total{h}" for h in halves)
            total = f"({total})" if len(halves) > 1 else total
            if plane.minimum_dtype:
                inner.append(f"sums{s} += tl.sum({product}, 3) * scale + {total} * shift")
            else:
                low = f" + {float(plane.low)} * {total}" if plane.low else ""
                inner.append(f"sums{s} += (tl.sum({product}, 3){low}) * scale")
    lines += [f"    {line}" for line in inner]
    lines += [f"sum{s} = tl.sum(tl.sum(sums{s}, 2), 1)" for s in streams]
    lines += ["total = tl.sum(tl.sum(squares, 2), 1)"] if base.norm else []
    return [*lines, *split_depth.finish_lines(base, operands, depth, finish_lines(base))]


def _sharing(plane: Plane) -> list[tuple[int, int]]:
    """Return the first and the last of the halves of a byte that one scale is for."""
    halves = _halves(plane)
    whole = plane.group % (STRIP * len(halves)) == 0
    return [(0, len(halves) - 1)] if whole else [(h, h) for h in halves]


def _scales_of(spec: QuantizedLinearSpec, stream: int, half: int, mask: str) -> list[str]:
    """Return the lines that load `scale`, and with minimums `shift`, for each thread of a strip:
    one value that its four threads would share would go through shared memory.
    """
    plane, count = spec.plane, len(_halves(spec.plane))
    lines = [f"group = (strip * {STRIP * count} + {STRIP * half}) // {plane.group} + quarter * 0"]
    load = f"tl.load(scales{stream} + group{mask})"
    lines.append(f"scale = tl.sum({load}.to(tl.float32), 3)")  # of one value
    if plane.minimum_dtype:
        load = f"tl.load(minimums{stream} + group{mask})"
        lines.append(f"shift = {float(plane.low)} * scale - tl.sum({load}.to(tl.float32), 3)")
    return lines


def _tiles(
    spec: QuantizedLinearSpec, operands: list[Operand], depth: Shared, card: Card
) -> list[str]:
    """Return the body for a tile of tokens: weights in two parts times x[k, t] on tensor cores."""
    base, plane = spec.linear, spec.plane
    count = len(_halves(plane))
    lines = [
        *tile_lines(base, split_depth.begin_lines(depth.split)),
        "column = (item % across * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]",
        f"column = tl.minimum(column, {base.columns - 1})",
        f"byte = tl.arange(0, {STRIP})[None, None, :]",
        f"k = tl.arange(0, STRIPS * {STRIP})[:, None]",
        f"x_at = {x_row(base, 'token')}",
    ]
    for s in range(base.streams):
        lines += [*weight_lines(spec, s), f"sum{s} = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)"]
    strips, zeros = base.depth // (STRIP * count), f"[STRIPS * {STRIP}, BLOCK_T], tl.float32"
    lines += [f"squares = tl.zeros({zeros})"] if base.norm else []
    first, step = split_depth.steps(depth.split, "STRIPS")
    lines += [f"for start in range({first}, {strips}, {step}):"]
    inner = [
        "strip = start + tl.arange(0, STRIPS)[None, :, None]",
        f"inside = strip < {strips}",
    ]
    for h in _halves(plane):
        mask = f", mask=place < {base.depth}, other=0.0"
        normed = ["squares += x * x", *gain_lines(base, "place", mask), f"x = {scaled(base, 'x')}"]
        inner += [
            f"place = (start + k // {STRIP}) * {STRIP * count} + {STRIP * h} + k % {STRIP}",
            *_order_lines(spec, f", mask=place < {base.depth}, other={base.depth}"),
            f"x = tl.load(x_at + place{mask}).to(tl.float32)",
            *(normed if base.norm else []),
            *two_parts("x", f"x{h}_0", f"x{h}_1"),
        ]
    for s in range(base.streams):
        inner.append(f"codes = tl.load(row{s} + strip * {STRIP} + byte, mask=inside, other=0)")
        inner += _numbers(plane, card)
        for h in _halves(plane):
            inner += [
                *_affine(spec, s, h),
                f"w = tl.reshape(u{h} * scale + shift, [BLOCK_N, STRIPS * {STRIP}])",
                *two_parts("w", "w0", "w1"),
                f'sum{s} = product(w0, x{h}_0, sum{s}, "ieee")',
                f'sum{s} = product(w1, x{h}_0, sum{s}, "ieee")',
            ]
            if base.x.operand.dtype != "bf16":
                inner.append(f'sum{s} = product(w0, x{h}_1, sum{s}, "ieee")')
    lines += [f"    {line}" for line in inner]
    lines += ["total = tl.sum(squares, 0)[None, :]"] if base.norm else []
    return [*lines, *split_depth.finish_lines(base, operands, depth, finish_lines(base))]
