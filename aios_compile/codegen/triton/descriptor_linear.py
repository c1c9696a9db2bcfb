"""Linear kernel for many tokens on sm_90 and newer: tiles through tensor descriptors, persistent.

As many programs as the card has multiprocessors walk over the tiles (of tokens and columns, GROUP
rows of tokens side by side); TMA brings blocks of x and w into shared memory without a register or
an address computation, and fills with zeros what lies beyond the edges, so that only stores are
masked. Sums over k are in the order of tile_linear.py. A candidate (Config kind "descriptor"): it
has been compiled and interpreted, and measured nowhere yet, so that the model does not choose it.
The loop over tiles is not warp-specialised: with Triton 3.7.1 that leaves the binary for sm_90 as
it is, and for sm_100 it spilled (24 to 1,176 bytes, six shapes) or compiled to a trap (two).
After Triton's persistent matmul tutorial.
"""

from __future__ import annotations

from aios_compile.codegen.naming import variable
from aios_compile.codegen.operand import BYTES, Operand
from aios_compile.codegen.strided import Strided
from aios_compile.codegen.triton.cards import Card
from aios_compile.codegen.triton.configs import Config
from aios_compile.codegen.triton.frame import Launch, python_dim
from aios_compile.codegen.triton.linear_spec import LinearSpec
from aios_compile.codegen.triton.linear_text import kernel_text, parts_of, tail_lines
from aios_compile.codegen.triton.tile_linear import GROUP
from aios_compile.errors import CodegenError

ALIGNMENT = 16  # bytes of a descriptor's base and strides


def serves(spec: LinearSpec, card: Card) -> bool:
    """Return whether the card has descriptors and x and w begin and step in whole 16 bytes."""
    return card.dependent_launch and _is_aligned(spec.x) and _is_aligned(spec.weight)


def _is_aligned(view: Strided) -> bool:
    stride, offset, size = view.operand.strides[0], view.offset, BYTES[view.operand.dtype]
    if not isinstance(offset, int) or not isinstance(stride, int):
        return False
    return offset * size % ALIGNMENT == 0 and stride * size % ALIGNMENT == 0


def kernels(
    spec: LinearSpec, operands: list[Operand], config: Config, name: str, card: Card
) -> tuple[list[str], tuple[Launch, ...]]:
    """Return the kernel function and its launch. Raises CodegenError for what it cannot serve."""
    if not serves(spec, card):
        raise CodegenError(
            f"{card.target} has no tensor descriptors for {spec.name} over {spec.depth} inputs",
            advice="choose a configuration of kind tile",
        )
    sizes = {"BLOCK_T": config.block_t, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    sizes |= {"GROUP": GROUP, "PROGRAMS": card.processors}
    rows, across = python_dim(spec.x.operand.shape[0]), -(-spec.columns // config.block_n)
    tiles = f"(({rows} + {config.block_t - 1}) // {config.block_t}) * {across}"
    text = kernel_text(name, operands, tuple(sizes), _body(spec, config))
    grid = f"min({card.processors}, {tiles})"
    launch = Launch(name, grid, tuple(sizes.items()), config.num_warps, config.num_stages)
    return [text], (launch,)


def _descriptor(view: Strided, first: int, rows: str, depth: int, block: str) -> str:
    """Return the text of a descriptor of rows [rows, depth] that begin `first` elements in."""
    assert isinstance(view.offset, int), "an aligned view begins at a fixed place"
    begin, stride = view.offset + first, view.operand.strides[0]
    base = variable(view.operand, view.index) + (f" + {begin}" if begin else "")
    return (
        f"tl.make_tensor_descriptor({base}, shape=[{rows}, {depth}], strides=[{stride}, 1], "
        f"block_shape=[{block}, BLOCK_K])"
    )


def _body(spec: LinearSpec, config: Config) -> list[str]:
    streams, depth = range(spec.streams), spec.depth
    rows, across = python_dim(spec.x.operand.shape[0]), -(-spec.columns // config.block_n)
    factor, split_x, precision = parts_of(spec)
    stride = spec.weight.operand.strides[0]
    assert isinstance(stride, int), "weights have a fixed layout"
    lines = [f"x_tiles = {_descriptor(spec.x, 0, rows, depth, 'BLOCK_T')}"]
    for s in streams:
        first = s * spec.columns * stride
        made = _descriptor(spec.weight, first, str(spec.columns), depth, "BLOCK_N")
        lines.append(f"w{s}_tiles = {made}")
    lines += [
        f"down = ({rows} + BLOCK_T - 1) // BLOCK_T",
        f"for item in range(tl.program_id(0), down * {across}, PROGRAMS):",
    ]
    tile = [
        f"first = item // (GROUP * {across}) * GROUP",
        "height = tl.minimum(down - first, GROUP)",
        f"inside = item % (GROUP * {across})",
        "from_t = (first + inside % height) * BLOCK_T",
        "from_n = (inside // height) * BLOCK_N",
        *(f"sum{s} = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)" for s in streams),
        f"for start in range(0, {depth}, BLOCK_K):",
        *(f"    {line}" for line in ("x = x_tiles.load([from_t, start])", *split_x)),
    ]
    parts = [line.split(" ")[0] for line in split_x if line.startswith("x")]
    for s in streams:
        load = f"w{s}_tiles.load([from_n, start]).to(tl.{factor})"
        tile.append(f"    row{s} = tl.trans({load})")
        tile += [f'    sum{s} = product({p}, row{s}, sum{s}, "{precision}")' for p in parts]
    tile += [
        "i0 = (from_t.to(tl.int64) + tl.arange(0, BLOCK_T))[:, None]",
        "i1 = (from_n.to(tl.int64) + tl.arange(0, BLOCK_N))[None, :]",
        f"mask0 = i0 < {rows}",
        f"mask1 = i1 < {spec.columns}",
        *tail_lines(spec),
    ]
    return [*lines, *(f"    {line}" for line in tile)]
