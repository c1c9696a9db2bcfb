"""Linear kernel for many tokens: tiles of tokens and columns on the tensor cores.

Grid: one program a tile, tiles of GROUP rows of tokens side by side, so that the weights that
neighbours read are still in L2 (the Triton matmul tutorial's grouped ordering). Loads are staged
through shared memory by Triton's pipeliner (cp.async; wgmma on Hopper). Rows and columns beyond the
end read the last one again instead of being masked: only the stores are.
"""

from __future__ import annotations

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

GROUP = 8


def kernels(
    spec: LinearSpec, operands: list[Operand], config: Config, name: str
) -> tuple[list[str], tuple[Launch, ...]]:
    """Return the kernel function of a variant and its launch."""
    sizes = {"BLOCK_T": config.block_t, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    sizes["GROUP"] = GROUP
    rows = python_dim(spec.x.operand.shape[0])
    down = f"(({rows} + {config.block_t - 1}) // {config.block_t})"
    grid = f"{down} * {-(-spec.columns // config.block_n)}"
    text = kernel_text(name, operands, tuple(sizes), _body(spec, config))
    launch = Launch(name, grid, tuple(sizes.items()), config.num_warps, config.num_stages)
    return [text], (launch,)


def _body(spec: LinearSpec, config: Config) -> list[str]:
    streams, depth = range(spec.streams), spec.depth
    rows, across = python_dim(spec.x.operand.shape[0]), -(-spec.columns // config.block_n)
    factor, split_x, precision = parts_of(spec)
    lines = [
        "item = tl.program_id(0)",
        f"down = ({rows} + BLOCK_T - 1) // BLOCK_T",
        f"first = item // (GROUP * {across}) * GROUP",
        "height = tl.minimum(down - first, GROUP)",
        f"inside = item % (GROUP * {across})",
        "tile_t = (first + inside % height).to(tl.int64)",
        "tile_n = (inside // height).to(tl.int64)",
        "i0 = (tile_t * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]",
        "i1 = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]",
        f"mask0 = i0 < {rows}",
        f"mask1 = i1 < {spec.columns}",
        f"token = tl.minimum(i0, {rows} - 1)",
        f"column = tl.minimum(i1, {spec.columns - 1})",
        "k = tl.arange(0, BLOCK_K)",
        f"x_at = {x_row(spec, 'token')} + k[None, :]",
    ]
    lines += [f"w{s} = {w_row(spec, 'column', s)} + k[:, None]" for s in streams]
    lines += [f"sum{s} = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)" for s in streams]
    lines += [f"for start in range(0, {depth}, BLOCK_K):"]
    even = depth % config.block_k == 0
    x_mask, w_mask = (
        ("", "") if even
        else (", mask=k[None, :] < left, other=0.0", ", mask=k[:, None] < left, other=0.0")
    )  # fmt: skip
    inner = [] if even else [f"left = {depth} - start"]
    inner += [f"x = tl.load(x_at + start{x_mask})", *split_x]
    parts = [line.split(" ")[0] for line in split_x if line.startswith("x")]
    for s in streams:
        inner.append(f"row{s} = tl.load(w{s} + start{w_mask}).to(tl.{factor})")
        inner += [f'sum{s} = product({p}, row{s}, sum{s}, "{precision}")' for p in parts]
    return [*lines, *(f"    {line}" for line in inner), *tail_lines(spec)]
