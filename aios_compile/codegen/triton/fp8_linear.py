"""y[t, n] = f(sum over k of x[t, k] * w[n, k], ...) with both factors as 8-bit floats (e4m3).

w: rows of codes and a scale a group (codegen/planar.py). x: rounded to e4m3 by one scale a token,
448 over its largest value, which each program looks for before the product (x is in L2 by then; a
norm's root mean square cancels out of the codes). A group's product is a sum on the tensor cores of
its own, times the group's scale in float32: no long sum stays in the cores' short accumulators.
What e4m3 rounds is the whole error: the products are exact. rows: one token on the vector units;
tiles: up to 16, 32 or 64 tokens. Up to 32 tokens several programs may share the depth of a tile
(split_depth.py). Bytes: codes and scales once for each tile of tokens, x once for the largest value
in each program and once for the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, fx

from aios_compile.codegen.naming import layout, symbol_of
from aios_compile.codegen.operand import BYTES, Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import (
    candidate_variants,
    choice,
    linear_spec,
    quantized_configs,
    quantized_linear,
    split_depth,
)
from aios_compile.codegen.triton.candidate_variants import Others, candidates
from aios_compile.codegen.triton.cards import DEFAULT, Card
from aios_compile.codegen.triton.choice import Choice, Tuning
from aios_compile.codegen.triton.configs import Config, Problem
from aios_compile.codegen.triton.frame import Launch, module_text, python_dim
from aios_compile.codegen.triton.linear_spec import LinearSpec
from aios_compile.codegen.triton.linear_text import kernel_text, tail_lines, tile_lines, x_row
from aios_compile.codegen.triton.norm_prologue import gain_lines, scale_text, scaled
from aios_compile.codegen.triton.quantized_configs import STRIP
from aios_compile.codegen.triton.quantized_linear import (
    QuantizedLinearSpec,
    prefetch_codes,
    weight_lines,
)
from aios_compile.codegen.triton.split_depth import Shared
from aios_compile.codegen.triton.template import TEMPLATES
from aios_compile.errors import CodegenError
from aios_compile.ir.quant_format import E4M3_MAX
from aios_compile.ir.quantized import SMALLEST

SEARCHED = 32  # k of a step that looks for the largest value: more would fill the registers
STRIPS = 32  # threads of a row
EVICT = 'eviction_policy="evict_first"'


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> QuantizedLinearSpec | None:
    """Return the spec of a linear on rows of 8-bit floats and a pointwise tail, else None."""
    spec = quantized_linear.read_spec(body, operands)
    return spec if spec is not None and spec.plane.is_float else None


def reference(spec: QuantizedLinearSpec, body: fx.GraphModule, *tensors: Tensor) -> Any:
    """Compute the outputs in eager PyTorch from rows that are not packed: the definition."""
    return body(*tensors)


def emit(
    spec: QuantizedLinearSpec, card: Card = DEFAULT,
    chosen: Sequence[tuple[int | None, Config]] | None = None,
    tuning: Tuning | None = None,
) -> KernelSource:  # fmt: skip
    """Return the module; chosen, tuning: see quantized_linear.emit.

    Raises CodegenError for a card that does not multiply such numbers.
    """
    if not card.fp8:
        raise CodegenError(
            f"{card.target} ({card.name}) does not multiply e4m3 numbers",
            source_line=spec.linear.lines[0] if spec.linear.lines else None,
            advice="quantization='int8' runs on every GPU; fp8 on cuda:90 and cuda:100",
        )
    base, plane = spec.linear, spec.plane
    symbol, reasons = symbol_of("fp8_linear", (spec, chosen, card.target)), []
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
    head = (TEMPLATES / "fp8.py.txt").read_text().rstrip("\n")
    comment = [f"fp8_linear: e4m3 by {plane.group}, {quantized_linear.sizes_text(base)}"]
    comment += [f"  {layout(o)}" for o in operands]
    comment += [f"chosen for {x}" for x in reasons] + [f"model: {line}" for line in base.lines]
    rows = base.x.operand.shape[0]
    text = module_text(comment, operands, [head, *parts], variants, rows, workspace)
    return KernelSource(
        "fp8_linear", symbol, "triton", text, len(base.operands), linear_spec.inplace(base),
        base.lines, tuple(workspace), counters,
        candidates=candidates(others, problem_of(spec).signature("fp8_linear")),
    )  # fmt: skip


def _shared(base: LinearSpec, config: Config) -> Shared:
    return Shared(config.split, -(-base.columns // config.block_n), config.block_t, False)


def _variant(
    spec: QuantizedLinearSpec, operands: list[Operand], card: Card, config: Config, name: str
) -> tuple[list[str], tuple[Launch, ...]]:
    """Return the kernel function of a configuration and its launch."""
    depth, tokens = _shared(spec.linear, config), config.block_t
    grid = str(depth.tiles * config.split)
    sizes: list[tuple[str, int | str]] = [("BLOCK_N", config.block_n), ("SPLIT", config.split)]
    if config.kind == "rows":
        body = _rows(spec, operands, depth, prefetch_codes(spec, depth, card, config.block_n))
    else:
        sizes = [("BLOCK_T", tokens), *sizes]
        body = _tiles(spec, operands, depth)
        if config.kind == "tile":
            rows = python_dim(spec.linear.x.operand.shape[0])
            grid = f"(({rows} + {tokens - 1}) // {tokens}) * {depth.tiles}"
    text = kernel_text(name, operands, tuple(n for n, _ in sizes), body)
    return [text], (Launch(name, grid, tuple(sizes), config.num_warps, config.num_stages),)


def problem_of(spec: QuantizedLinearSpec) -> Problem:
    """Return the sizes that the cost model needs."""
    base = spec.linear
    return Problem(
        base.columns, base.depth, base.streams, spec.plane.row_bytes / base.depth,
        BYTES[base.x.operand.dtype], scans=True,
    )  # fmt: skip


def choices(
    spec: QuantizedLinearSpec, card: Card = DEFAULT, tuning: Tuning | None = None
) -> list[Choice]:
    """Return the choice for each range of rows; tiles go through a group of k a step."""
    problem = problem_of(spec)
    found = quantized_configs.float_ranges(problem, spec.plane.group, card)
    build = partial(_alone, spec, card)
    return choice.choose(problem, card, tuning, build, found, "fp8_linear")


def _alone(spec: QuantizedLinearSpec, card: Card, config: Config) -> KernelSource:
    return emit(spec, card, ((None, config),))


def _gained(base: LinearSpec, name: str, place: str, mask: str) -> list[str]:
    """Return the lines that multiply x by the norm's weight; none without a norm."""
    if base.norm is None:
        return []
    return [*gain_lines(base, place, mask), f"{name} = {scaled(base, name)}"]


def _stats(base: LinearSpec, load: str, zeros: str, place: str, mask: str) -> list[str]:
    """Return the loop over x that finds the largest value of a token and sums its squares."""
    normed = base.norm is not None
    lines = [f"largest = tl.zeros({zeros}, tl.float32)"]
    lines += [f"squares = tl.zeros({zeros}, tl.float32)"] if normed else []
    lines += [f"for start in range(0, {base.depth}, STEP):", f"    x = {load}.to(tl.float32)"]
    lines += ["    squares += x * x"] if normed else []
    lines += [f"    {line}" for line in _gained(base, "x", place, mask)]
    return [*lines, "    largest = tl.maximum(largest, tl.abs(x))"]


def _scales(base: LinearSpec, axis: int, shape: str) -> list[str]:
    """Return the lines from the statistics to `inverse`, of the codes, and `back`, of the sums."""
    lines = [
        f"top = tl.max(largest, {axis}){shape}",
        f"live = top >= {SMALLEST!r}  # a NaN is its own code",
        f"inverse = tl.where(live, {E4M3_MAX} / tl.where(live, top, 1.0), 0.0)",
        f"back = tl.where(live, top / {E4M3_MAX}, 0.0)",
    ]
    if base.norm is not None:
        lines.append(f"back *= {scale_text(base, f'tl.sum(squares, {axis}){shape}')}")
    return lines


def _rows(
    spec: QuantizedLinearSpec, operands: list[Operand], depth: Shared, prefetches: list[str]
) -> list[str]:
    """Return the body for one token; codes are blocks [BLOCK_N, STRIPS, 4, 4], four of a thread
    (see quantized_linear._rows).
    """
    base, plane, streams = spec.linear, spec.plane, range(spec.linear.streams)
    mask = f", mask=place < {base.depth}, other=0.0"
    lines = [
        *split_depth.begin_lines(depth.split),
        "i0 = tl.full([1], 0, tl.int64)",
        f"mask0 = i0 < {python_dim(base.x.operand.shape[0])}",
        "i1 = item * BLOCK_N + tl.arange(0, BLOCK_N)",
        f"mask1 = i1 < {base.columns}",
        f"column = tl.minimum(i1, {base.columns - 1})[:, None, None, None]",
        f"strip = tl.arange(0, {STRIPS})[None, :, None, None] * {STRIP}",
        "quarter = tl.arange(0, 4)[None, None, :, None]",
        "byte = strip + 4 * quarter + tl.arange(0, 4)[None, None, None, :]",
        f"x_at = {x_row(base, '0')}",
        *prefetches,
    ]
    step = str(STRIPS * STRIP)
    stats = _stats(base, f"tl.load(x_at + place{mask})", f"[1, {STRIPS}, 4, 4]", "place", mask)
    loop = next(i for i, line in enumerate(stats) if line.startswith("for "))
    stats.insert(loop + 1, "    place = start + byte")
    lines += [line.replace("STEP", step) for line in stats]
    lines += ["largest = tl.max(tl.max(largest, 3), 2)"]
    lines += ["squares = tl.sum(tl.sum(squares, 3), 2)"] if base.norm else []
    lines += _scales(base, 1, "")
    for s in streams:
        lines += [*weight_lines(spec, s), f"sums{s} = tl.zeros([BLOCK_N, {STRIPS}, 4], tl.float32)"]
    begin, step = split_depth.steps(depth.split, step)
    lines += [f"for start in range({begin}, {base.depth}, {step}):"]
    inner = ["place = start + byte", f"x = tl.load(x_at + place{mask}).to(tl.float32)"]
    inner += [*_gained(base, "x", "place", mask)]
    inner += ["x = e4m3(x * inverse[:, None, None, None]).to(tl.float32)"]
    strip = "(start + strip + quarter * 0)"
    for s in streams:
        load = f"tl.load(row{s} + place, mask=place < {base.depth}, other=0, {EVICT})"
        group = f"scales{s} + {strip} // {plane.group}"
        inner += [
            f"codes = e4m3_of({load}).to(tl.float32)",
            f"scale = tl.load({group}, mask={strip} < {base.depth}, other=0.0).to(tl.float32)",
            f"sums{s} += tl.sum(codes * x, 3) * tl.sum(scale, 3)",  # one scale a strip
        ]
    lines += [f"    {line}" for line in inner]
    lines += [f"sum{s} = tl.sum(tl.sum(sums{s}, 2), 1)" for s in streams]
    return [*lines, *_finish(base, operands, depth)]


def _finish(base: LinearSpec, operands: list[Operand], depth: Shared) -> list[str]:
    """Return the lines from the sums of codes to the outputs."""
    tail = [*(f"sum{s} *= back" for s in range(base.streams)), *tail_lines(base)]
    return split_depth.finish_lines(base, operands, depth, tail)


def _tiles(spec: QuantizedLinearSpec, operands: list[Operand], depth: Shared) -> list[str]:
    """Return the body for a tile of tokens: w[n, k] times x[k, t], a group of k a step."""
    base, plane, streams = spec.linear, spec.plane, range(spec.linear.streams)
    lines = [
        *tile_lines(base, split_depth.begin_lines(depth.split)),
        f"column = tl.minimum(i1, {base.columns - 1})",
        f"k = tl.arange(0, {plane.group})",
        f"x_at = {x_row(base, 'token')} + k[:, None]",
    ]
    zeros, place = f"[{SEARCHED}, BLOCK_T]", f"start + tl.arange(0, {SEARCHED})[:, None]"
    stats = _stats(base, f"tl.load({x_row(base, 'token')} + {place})", zeros, place, "")
    lines += [line.replace("STEP", str(SEARCHED)) for line in stats]
    lines += _scales(base, 0, "[None, :]")
    for s in streams:
        lines += [*weight_lines(spec, s), f"sum{s} = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)"]
    first, step = split_depth.steps(depth.split, str(plane.group))
    lines += [f"for start in range({first}, {base.depth}, {step}):"]
    inner = ["x = tl.load(x_at + start).to(tl.float32)"]
    inner += [*_gained(base, "x", "start + k[:, None]", ""), "numbers = e4m3(x * inverse)"]
    for s in streams:
        inner += [
            f"codes = e4m3_of(tl.load(row{s} + start + k[None, :], {EVICT}))",
            f"scale = tl.load(scales{s} + start // {plane.group}).to(tl.float32)",
            f"sum{s} += multiply(codes, numbers) * scale",
        ]
    lines += [f"    {line}" for line in inner]
    return [*lines, *_finish(base, operands, depth)]
