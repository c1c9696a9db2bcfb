"""Linear kernels for few tokens: a program streams some rows of w once, 16 bytes a load along k.

rows: up to 4 tokens, products and sums in float32 on the vector units. A thread has a sum for each
of its places in a block of k; the block is summed once, at the end: no exchange inside the loop,
and the depth is split over all threads of a program. dot: up to 32 tokens on the tensor cores,
w[n, k] times x[k, t], so that a tile of 16 columns is enough. `split` programs may share the depth
of a tile: split_depth.py. A norm of x rides along: norm_prologue.py.
Weights are marked evict_first: nothing reads them again in this step (where the tensor cores take
them through cp.async, Triton 3.7 drops the hint).
"""

from __future__ import annotations

from aios_compile.codegen.operand import BYTES, Operand
from aios_compile.codegen.triton import split_depth
from aios_compile.codegen.triton.configs import Config
from aios_compile.codegen.triton.dependent_launch import prefetch_lines
from aios_compile.codegen.triton.frame import Launch, python_dim
from aios_compile.codegen.triton.linear_spec import LinearSpec
from aios_compile.codegen.triton.linear_text import (
    kernel_text,
    parts_of,
    tail_lines,
    w_row,
    x_row,
)
from aios_compile.codegen.triton.norm_prologue import finish_lines, gain_lines, scale_text, scaled
from aios_compile.codegen.triton.split_depth import Shared

EVICT = 'eviction_policy="evict_first"'


def shared(spec: LinearSpec, config: Config) -> Shared:
    """Return how a configuration shares the depth of its tiles."""
    tiles = -(-spec.columns // config.block_n)
    return Shared(config.split, tiles, config.block_t, spec.norm is not None)


def kernels(
    spec: LinearSpec, operands: list[Operand], config: Config, name: str
) -> tuple[list[str], tuple[Launch, ...]]:
    """Return the kernel functions of a variant and its launches."""
    blocks = f"(({spec.columns} + {config.block_n - 1}) // {config.block_n})"
    sizes = (("BLOCK_N", config.block_n), ("BLOCK_K", config.block_k))
    if config.kind == "rows":
        text = kernel_text(name, operands, ("BLOCK_N", "BLOCK_K"), _rows(spec, config))
        return [text], (Launch(name, blocks, sizes, config.num_warps, 1),)
    constexprs = (("BLOCK_T", config.block_t), *sizes, ("SPLIT", config.split))
    text = kernel_text(
        name, operands, tuple(n for n, _ in constexprs), _dot(spec, operands, config)
    )
    grid = f"{blocks} * {config.split}"
    return [text], (Launch(name, grid, constexprs, config.num_warps, config.num_stages),)


def _rows(spec: LinearSpec, config: Config) -> list[str]:
    """Return the body for up to `block_t` tokens, each with its own sums."""
    tokens, streams = range(config.block_t), range(spec.streams)
    rows = python_dim(spec.x.operand.shape[0])
    lines = ["i1 = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)"]
    lines += [f"mask1 = i1 < {spec.columns}", "k = tl.arange(0, BLOCK_K)"]
    lines += [f"column = tl.minimum(i1, {spec.columns - 1})[:, None]"]
    lines += [f"w{s} = {w_row(spec, 'column', s)} + k[None, :]" for s in streams]
    lines += prefetch_lines(spec, config)
    wide = spec.x.operand.dtype == "f32" and BYTES[spec.weight.operand.dtype] == 2
    for t in tokens:
        token = f"tl.minimum({rows} - 1, {t}).to(tl.int64)" if t else "0"
        lines += [f"x{t} = {x_row(spec, token)}" + ("" if wide else " + k[None, :]")]
    zeros = "tl.zeros([BLOCK_N, BLOCK_K], tl.float32)"
    lines += [f"sums{s}_{t} = {zeros}" for s in streams for t in tokens]
    if spec.norm is not None:
        lines += [f"squares{t} = tl.zeros([1, BLOCK_K], tl.float32)" for t in tokens]
    lines += [f"for start in range(0, {spec.depth}, BLOCK_K):"]
    even = spec.depth % config.block_k == 0
    mask = "" if even else ", mask=inside, other=0.0"
    inner = [] if even else [f"inside = k[None, :] < {spec.depth} - start"]
    for s in streams:
        load = f"tl.load(w{s} + start{mask}, {EVICT})"
        inner.append(f"row{s} = {load}.to(tl.float32)")
    inner += gain_lines(spec, "start + k[None, :]", mask)
    for t in tokens:
        narrow = f"tl.load(x{t} + start{mask}).to(tl.float32)"
        left = f"{spec.depth} - start, BLOCK_K, {even}"
        inner.append(f"value{t} = " + (f"octets(x{t} + start, {left})" if wide else narrow))
        if spec.norm is not None:
            inner.append(f"squares{t} += value{t} * value{t}")
            inner.append(f"value{t} = {scaled(spec, f'value{t}')}")
        inner += [f"sums{s}_{t} += row{s} * value{t}" for s in streams]
    lines += [f"    {line}" for line in inner]
    for t in tokens:
        lines += [f"i0 = tl.full([1], {t}, tl.int64)", f"mask0 = i0 < {rows}"]
        lines += [f"sum{s} = tl.sum(sums{s}_{t}, 1)" for s in streams]
        if spec.norm is not None:
            lines.append(f"scale = {scale_text(spec, f'tl.sum(squares{t}, 1)')}")
            lines += [f"sum{s} *= scale" for s in streams]
        lines += tail_lines(spec)
    return lines


def _dot(spec: LinearSpec, operands: list[Operand], config: Config) -> list[str]:
    """Return the body that multiplies w[n, k] with x[k, t] for all tokens at once."""
    streams, depth = range(spec.streams), spec.depth
    rows = python_dim(spec.x.operand.shape[0])
    factor, split_x, precision = parts_of(spec)
    lines = [
        *split_depth.begin_lines(config.split),
        "i1 = (item * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]",
        f"mask1 = i1 < {spec.columns}",
        f"column = tl.minimum(i1, {spec.columns - 1})",
        "i0 = tl.arange(0, BLOCK_T)[None, :].to(tl.int64)",
        f"mask0 = i0 < {rows}",
        f"token = tl.minimum(i0, {rows} - 1)",
        "k = tl.arange(0, BLOCK_K)",
    ]
    lines += [f"w{s} = {w_row(spec, 'column', s)} + k[None, :]" for s in streams]
    lines += prefetch_lines(spec, config)
    lines += [f"x_at = {x_row(spec, 'token')} + k[:, None]"]
    lines += [f"sum{s} = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)" for s in streams]
    if spec.norm is not None:
        lines += ["squares = tl.zeros([BLOCK_K, BLOCK_T], tl.float32)"]
    first, step = split_depth.steps(config.split, "BLOCK_K")
    lines += [f"for start in range({first}, {depth}, {step}):"]
    even = depth % config.block_k == 0
    inner = [] if even else [f"left = {depth} - start"]
    x_mask, w_mask = (
        ("", "") if even
        else (", mask=k[:, None] < left, other=0.0", ", mask=k[None, :] < left, other=0.0")
    )  # fmt: skip
    inner += [f"x = tl.load(x_at + start{x_mask})"]
    if spec.norm is not None:
        gain = gain_lines(spec, "start + k[:, None]", x_mask)
        inner += ["squares += x * x", *gain, f"x = {scaled(spec, 'x')}"]
    inner += split_x
    parts = [line.split(" ")[0] for line in split_x if line.startswith("x")]
    for s in streams:
        inner.append(f"row{s} = tl.load(w{s} + start{w_mask}, {EVICT}).to(tl.{factor})")
        inner += [f'sum{s} = product(row{s}, {p}, sum{s}, "{precision}")' for p in parts]
    lines += [f"    {line}" for line in inner]
    if spec.norm is not None:
        lines += ["total = tl.sum(squares, 0)[None, :]"]
    finish = split_depth.finish_lines(spec, operands, shared(spec, config), finish_lines(spec))
    return [*lines, *finish]
