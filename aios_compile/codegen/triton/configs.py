"""Configurations of a linear kernel: enumerated from its sizes and what fits the card.

cost_model.py orders them, choice.py picks one. With a GPU, `candidates` is what a tuner measures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from aios_compile.codegen.triton.cards import Card

# The row bounds of a linear, and the kernels that may serve each: weights streamed through
# the vector units, through the tensor cores with one tile of tokens, tiles of tokens.
BOUNDS: tuple[tuple[int | None, tuple[str, ...]], ...] = (
    (1, ("rows",)),
    (4, ("rows", "dot")),
    (16, ("dot",)),
    (32, ("dot",)),
    (64, ("dot", "tile")),
    (None, ("tile",)),
)
PREFILL_TOKENS = 2048  # the number of tokens for which an unbounded variant is chosen


@dataclass(frozen=True)
class Config:
    """The blocks of one variant. `split`: programs that share a tile's depth."""

    kind: str
    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 3
    split: int = 1
    prefetch: bool = False

    @property
    def order(self) -> tuple[int, int, bool]:
        """Return what the order of a tile's sums over k depends on: the step of k, the parts, and
        whether the tensor cores take 64 rows of weights at once.
        """
        return self.block_k, self.split, self.block_n >= 64

    @property
    def bits(self) -> tuple[object, ...]:
        """Return what must be equal for two configurations of one range of rows to add alike.

        On the vector units a sum is spread over a program's threads along k; how many rows a
        program has is free. On the tensor cores it is the order; stages, warps and tiles are free.
        """
        if self.kind == "rows":
            return self.kind, self.block_k, self.split, self.num_warps
        return ("dot" if self.kind == "dot" else "tile", *self.order)

    def text(self) -> str:
        """Return the configuration in words: its name among those of one range of rows."""
        split = f" split {self.split}" if self.split > 1 else ""
        stages = f" {self.num_stages} stages" if self.kind != "rows" else ""
        blocks = f"{self.block_t}x{self.block_n}x{self.block_k}"
        return f"{self.kind} {blocks} {self.num_warps} warps{stages}{split}"


Ranges = Sequence[tuple[int | None, Sequence[Config]]]  # row bound, configurations


@dataclass(frozen=True)
class Problem:
    """The sizes of a linear: columns are a stream's; a weight and an activation have bytes.

    parts: how many products an activation takes part in. normed: its squares are summed besides.
    scans: each program reads all of x once before its part of the product.
    """

    columns: int
    depth: int
    streams: int
    weight_bytes: float
    x_bytes: int
    parts: int = 1
    normed: bool = False
    scans: bool = False

    def signature(self, name: str) -> str:
        """Return what a measurement of an emitter's kernels is kept under (kernel_ledger.py)."""
        found = f"{name} {self.streams}x{self.columns}x{self.depth}"
        found += f" weights {8 * self.weight_bytes:g} bits, x {8 * self.x_bytes} bits"
        return found + (", normed" if self.normed else "")


def ranges(problem: Problem, card: Card) -> Ranges:
    """Return (row bound, configurations) of a linear on floats."""
    return tuple(
        (
            most,
            [c for kind in kinds for c in candidates(problem, kind, most or PREFILL_TOKENS, card)],
        )
        for most, kinds in BOUNDS
    )


def candidates(problem: Problem, kind: str, tokens: int, card: Card) -> list[Config]:
    """Return the configurations that fit the card and the sizes."""
    if kind == "rows":
        found = [
            Config("rows", tokens, n, k, warps)
            for n, k, warps in itertools.product((1, 2, 4, 8), (256, 512, 1024, 2048), card.warps)
        ]
        return [c for c in found if _rows_fit(c, problem, card)] or [
            Config(
                "rows",
                tokens,
                8 // problem.streams,
                64,
                1 if len(card.warps) > 1 else card.warps[0],
            )
        ]
    if kind == "dot":
        found = [
            Config("dot", max(16, tokens), n, k, warps, stages, split)
            for n, k, warps, stages, split in itertools.product(
                (16, 32, 64), (64, 128, 256), (4,), (3, 4), (1, 2, 4, 8)
            )
        ]
    else:
        tiles = ((64, 32), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256))
        found = [
            Config("tile", t, n, k, 8 if t * n * problem.streams >= 128 * 128 else 4, stages)
            for (t, n), k, stages in itertools.product(tiles, (32, 64), (3, 4))
        ]
    fitting = [c for c in found if _tiles_fit(c, problem, card)]
    return fitting or [Config(kind, max(16, tokens) if kind == "dot" else 16, 16, 32, 4, 2)]


def _rows_fit(c: Config, p: Problem, card: Card) -> bool:
    """Return whether each thread has one to four 16-byte loads a block and the sums fit.

    Two: of two streams that meet half precision ptxas spills the fourth load on sm_100.
    """
    most = 2 if p.streams > 1 and p.x_bytes < 4 else 4
    if c.num_warps == 8 or (p.streams > 1 and not p.normed):
        most = min(most, card.loads)
    loaded = c.block_k * p.weight_bytes / (c.num_warps * card.warp * 16)
    rows = c.block_n * p.streams
    whole = loaded in (1, 2, 4) and rows * loaded <= most
    return whole and c.block_k < 2 * p.depth and sums(c, p, card) * c.block_t <= 64


def sums(c: Config, p: Problem, card: Card) -> int:
    """Return the sums that a thread holds for one token."""
    return c.block_n * p.streams * c.block_k // (c.num_warps * card.warp)


def _tiles_fit(c: Config, p: Problem, card: Card) -> bool:
    """Return whether buffers, sums and the parts of x fit, so that nothing spills.

    The bounds on a thread's elements are what compiled without spills at the shapes of
    tests/nightly/test_triton_matrix.py: float32 x is split into parts in registers.
    """
    threads = c.num_warps * card.warp
    weights = c.block_n * p.streams * c.block_k * p.weight_bytes
    shared = c.num_stages * (weights + c.block_t * c.block_k * p.x_bytes)
    held_sums = c.block_t * c.block_n * p.streams // threads
    x_elements = c.block_t * c.block_k // threads
    in_registers = c.kind == "tile" and not card.async_dots
    most_x = 64 if p.x_bytes < 4 else 16 if c.kind == "dot" and c.block_n < 64 else 32
    most_x = most_x // 2 // p.streams if in_registers else most_x
    most_x = min(most_x, 16) if p.normed and c.kind == "dot" else most_x
    depth = c.block_k * c.split <= max(64, p.depth)
    narrow = c.block_k < 256 or c.block_n == 16
    held = held_sums <= card.sums and held_sums * p.parts <= 128
    fits = shared <= card.shared_bytes - 4096 and held
    # Two products into one sum whose warps do not all stand along the tokens: Triton moves the sums
    # through shared memory between them (65 barriers a step of 64x128x64 on sm_90).
    along = c.kind != "tile" or not card.async_dots or p.parts == 1
    along = along or c.block_t >= 16 * c.num_warps
    return fits and along and x_elements <= most_x and depth and narrow
