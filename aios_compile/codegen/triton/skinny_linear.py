"""Linear kernels for few tokens: a program streams some rows of w once, 16 bytes a load along k.

rows: up to 4 tokens, products and sums in float32 on the vector units. A thread has a sum for each
of its places in a block of k; the block is summed once, at the end: no exchange inside the loop,
and the depth is split over all threads of a program. dot: up to 32 tokens on the tensor cores,
w[n, k] times x[k, t], so that a tile of 16 columns is enough. `split` programs may share the depth
of a tile: each writes its sums to the workspace and a second launch adds them in ascending order.
Weights are marked evict_first: nothing reads them again in this step (where the tensor cores take
them through cp.async, Triton 3.7 drops the hint).
"""

from __future__ import annotations

from aios_compile.codegen.cpp.frame import variable
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.triton.configs import Config
from aios_compile.codegen.triton.frame import Launch, python_dim
from aios_compile.codegen.triton.linear_spec import LinearSpec
from aios_compile.codegen.triton.linear_text import (
    kernel_text,
    parts_of,
    tail_lines,
    w_row,
    x_row,
)

EVICT = 'eviction_policy="evict_first"'
COMBINE_BLOCK = 256


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
    launch = Launch(name, grid, constexprs, config.num_warps, config.num_stages)
    if config.split == 1:
        return [text], (launch,)
    combine = kernel_text(f"{name}_combine", operands, ("BLOCK",), _combine(spec, operands, config))
    grid = f"{python_dim(spec.x.operand.shape[0])} * {-(-spec.columns // COMBINE_BLOCK)}"
    second = Launch(f"{name}_combine", grid, (("BLOCK", COMBINE_BLOCK),))
    return [text, combine], (launch, second)


def _rows(spec: LinearSpec, config: Config) -> list[str]:
    """Return the body for up to `block_t` tokens, each with its own sums."""
    tokens, streams = range(config.block_t), range(spec.streams)
    rows = python_dim(spec.x.operand.shape[0])
    lines = ["i1 = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)"]
    lines += [f"mask1 = i1 < {spec.columns}", "k = tl.arange(0, BLOCK_K)"]
    lines += [f"column = tl.minimum(i1, {spec.columns - 1})[:, None]"]
    lines += [f"w{s} = {w_row(spec, 'column', s)} + k[None, :]" for s in streams]
    for t in tokens:
        token = f"tl.minimum({rows} - 1, {t}).to(tl.int64)" if t else "0"
        lines += [f"x{t} = {x_row(spec, token)} + k[None, :]"]
    zeros = "tl.zeros([BLOCK_N, BLOCK_K], tl.float32)"
    lines += [f"sums{s}_{t} = {zeros}" for s in streams for t in tokens]
    lines += [f"for start in range(0, {spec.depth}, BLOCK_K):"]
    even = spec.depth % config.block_k == 0
    mask = "" if even else ", mask=inside, other=0.0"
    inner = [] if even else [f"inside = k[None, :] < {spec.depth} - start"]
    for s in streams:
        load = f"tl.load(w{s} + start{mask}, {EVICT})"
        inner.append(f"row{s} = {load}.to(tl.float32)")
    for t in tokens:
        inner.append(f"value{t} = tl.load(x{t} + start{mask}).to(tl.float32)")
        inner += [f"sums{s}_{t} += row{s} * value{t}" for s in streams]
    lines += [f"    {line}" for line in inner]
    for t in tokens:
        lines += [f"i0 = tl.full([1], {t}, tl.int64)", f"mask0 = i0 < {rows}"]
        lines += [f"sum{s} = tl.sum(sums{s}_{t}, 1)" for s in streams]
        lines += tail_lines(spec)
    return lines


def _dot(spec: LinearSpec, operands: list[Operand], config: Config) -> list[str]:
    """Return the body that multiplies w[n, k] with x[k, t] for all tokens at once."""
    streams, depth = range(spec.streams), spec.depth
    rows = python_dim(spec.x.operand.shape[0])
    factor, split_x, precision = parts_of(spec)
    step = f"BLOCK_K * {config.split}" if config.split > 1 else "BLOCK_K"
    lines = ["item = tl.program_id(0).to(tl.int64)"]
    lines += ["part = (item % SPLIT).to(tl.int32)"] if config.split > 1 else []
    lines += [
        "i1 = (item // SPLIT * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]",
        f"mask1 = i1 < {spec.columns}",
        f"column = tl.minimum(i1, {spec.columns - 1})",
        "i0 = tl.arange(0, BLOCK_T)[None, :].to(tl.int64)",
        f"mask0 = i0 < {rows}",
        f"token = tl.minimum(i0, {rows} - 1)",
        "k = tl.arange(0, BLOCK_K)",
    ]
    lines += [f"w{s} = {w_row(spec, 'column', s)} + k[None, :]" for s in streams]
    lines += [f"x_at = {x_row(spec, 'token')} + k[:, None]"]
    lines += [f"sum{s} = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)" for s in streams]
    first = "part * BLOCK_K" if config.split > 1 else "0"
    lines += [f"for start in range({first}, {depth}, {step}):"]
    even = depth % config.block_k == 0
    inner = [] if even else [f"left = {depth} - start"]
    x_mask, w_mask = (
        ("", "") if even
        else (", mask=k[:, None] < left, other=0.0", ", mask=k[None, :] < left, other=0.0")
    )  # fmt: skip
    inner += [f"x = tl.load(x_at + start{x_mask})", *split_x]
    parts = [line.split(" ")[0] for line in split_x if line.startswith("x")]
    for s in streams:
        inner.append(f"row{s} = tl.load(w{s} + start{w_mask}, {EVICT}).to(tl.{factor})")
        inner += [f'sum{s} = product(row{s}, {p}, sum{s}, "{precision}")' for p in parts]
    lines += [f"    {line}" for line in inner]
    if config.split == 1:
        return lines + tail_lines(spec)
    partial = variable(operands[-1], len(operands) - 1)
    for s in streams:
        place = f"((part * {spec.streams} + {s}) * {rows} + i0) * {spec.columns} + i1"
        lines.append(f"tl.store({partial} + {place}, sum{s}, mask=mask0 & mask1)")
    return lines


def _combine(spec: LinearSpec, operands: list[Operand], config: Config) -> list[str]:
    """Return the body that adds the sums of the parts and applies the tail."""
    rows, columns = python_dim(spec.x.operand.shape[0]), spec.columns
    pieces = -(-columns // COMBINE_BLOCK)
    partial = variable(operands[-1], len(operands) - 1)
    lines = [
        "item = tl.program_id(0).to(tl.int64)",
        f"i0 = tl.full([1], 0, tl.int64) + item // {pieces}",
        f"i1 = item % {pieces} * BLOCK + tl.arange(0, BLOCK)",
        f"mask0 = i0 < {rows}",
        f"mask1 = i1 < {columns}",
    ]
    for s in range(spec.streams):
        place = f"{s} * {rows} + i0"
        lines += [f"at{s} = {partial} + ({place}) * {columns} + i1"]
        lines += [f"sum{s} = tl.load(at{s}, mask=mask1, other=0.0)"]
        for part in range(1, config.split):
            step = f"{part * spec.streams} * {rows} * {columns}"
            lines += [f"sum{s} += tl.load(at{s} + {step}, mask=mask1, other=0.0)"]
    return lines + tail_lines(spec)
