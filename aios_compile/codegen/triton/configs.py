"""Configurations of a linear kernel: enumerated from its sizes, ordered by a cost model.

The model: microseconds = launches + programs started in waves + the larger of bytes over what the
card can draw and operations over what it can do. A kernel draws the full bandwidth only with enough
bytes in flight (Little's law: bandwidth times latency) and with work on every multiprocessor.
Without a GPU the model's best is used; with one, `candidates` is what a tuner measures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from aios_compile.codegen.triton.cards import LATENCY_US, LAUNCH_US, Card

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
OVERLAP_LOSS = 0.05  # of the parts that the longest one hides
L2_FACTOR = 1.5  # what L2 delivers, relative to memory
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
    return fitting or [Config(kind, 16, 16, 32, 4, 2)]


def _rows_fit(c: Config, p: Problem, card: Card) -> bool:
    """Return whether each thread has one to four 16-byte loads a block and the sums fit."""
    loaded = c.block_k * p.weight_bytes / (c.num_warps * card.warp * 16)
    rows = c.block_n * p.streams
    whole = loaded in (1, 2, 4) and rows * loaded <= 4
    return whole and c.block_k < 2 * p.depth and _sums(c, p, card) * c.block_t <= 64


def _sums(c: Config, p: Problem, card: Card) -> int:
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
    sums = c.block_t * c.block_n * p.streams // threads
    x_elements = c.block_t * c.block_k // threads
    in_registers = c.kind == "tile" and not card.async_dots
    most_x = 64 if p.x_bytes < 4 else 16 if c.kind == "dot" and c.block_n < 64 else 32
    most_x = most_x // 2 // p.streams if in_registers else most_x
    most_x = min(most_x, 16) if p.normed and c.kind == "dot" else most_x
    depth = c.block_k * c.split <= max(64, p.depth)
    narrow = c.block_k < 256 or c.block_n == 16
    held = sums <= card.sums and sums * p.parts <= 128
    fits = shared <= card.shared_bytes - 4096 and held
    return fits and x_elements <= most_x and depth and narrow


def cost_us(c: Config, p: Problem, tokens: int, card: Card) -> float:
    """Return the model's microseconds for `tokens` rows."""
    across = math.ceil(p.columns / c.block_n)
    down = 1 if c.kind != "tile" else math.ceil(tokens / c.block_t)
    programs = across * down * c.split
    threads = c.num_warps * card.warp
    resident = _resident(c, p, card, threads)
    waves = math.ceil(programs / (card.processors * resident))
    tile_bytes = p.depth * (c.block_n * p.streams * p.weight_bytes) / c.split
    weight_bytes = p.columns * p.streams * p.depth * p.weight_bytes
    step = c.block_n * p.streams * c.block_k * p.weight_bytes
    buffers = 1 if c.kind == "rows" else max(1, c.num_stages - 1)
    busy = min(1.0, programs / card.processors)
    in_flight = min(resident, programs / card.processors) * step * buffers * card.processors
    drawn = card.bytes_per_us * min(1.0, in_flight / (card.bytes_per_us * LATENCY_US))
    heaviest = math.ceil(programs / card.processors) * tile_bytes / down
    x_bytes = programs * c.block_t * p.depth * p.x_bytes * (1 / c.split + p.scans)
    staged = (weight_bytes * down + x_bytes) / (L2_FACTOR * card.bytes_per_us)
    memory = max(weight_bytes / drawn, heaviest / card.processor_bytes_per_us())
    flops = 2.0 * programs * c.block_t * c.block_n * p.streams * p.depth / c.split * p.parts
    full = waves * card.processors * resident / programs if programs > card.processors else 1 / busy
    rate = card.flops_per_us * (_tile_rate(c) if c.kind == "tile" else 0.4)
    rate = rate if c.kind != "rows" else card.flops_per_us / 16
    compute = flops / rate
    combine = 0.0
    if c.split > 1:
        combine = (
            3 * LATENCY_US + 8.0 * c.split * tokens * p.columns * p.streams / card.bytes_per_us
        )
    parts = (memory, staged, compute * (full if c.kind == "tile" else 1.0))
    bound = max(parts) + OVERLAP_LOSS * sum(parts)
    return LAUNCH_US + waves * LATENCY_US + bound + combine


def _tile_rate(c: Config) -> float:
    """Return the share of the peak that a tile reaches: its operations for each byte it stages."""
    intensity = c.block_t * c.block_n / (c.block_t + c.block_n)
    return min(1.0, intensity / 64) * (0.85 if c.block_k < 64 else 1.0)


def _resident(c: Config, p: Problem, card: Card, threads: int) -> int:
    """Return how many programs a multiprocessor holds by registers, shared memory and threads."""
    if c.kind == "rows":
        registers = 32 + _sums(c, p, card) * (c.block_t + 1)
        shared = 1024.0
    else:
        registers = 48 + c.block_t * c.block_n * p.streams // threads
        step = c.block_n * p.streams * p.weight_bytes + c.block_t * p.x_bytes
        shared = max(1, c.num_stages - 1) * c.block_k * step
    by_registers = card.registers // (min(255, registers) * threads)
    return max(1, min(32, card.threads // threads, by_registers, int(card.shared_bytes // shared)))


def best(problem: Problem, kinds: Sequence[str], most: int | None, card: Card) -> Config:
    """Return the model's best configuration; the first of equals, so that it is deterministic."""
    tokens = PREFILL_TOKENS if most is None else most
    found = [c for kind in kinds for c in candidates(problem, kind, tokens, card)]
    return min(found, key=lambda c: cost_us(c, problem, tokens, card))


def choose(problem: Problem, card: Card) -> list[tuple[int | None, Config]]:
    """Return (row bound, configuration) of each variant; a bound that the next one serves is left
    out: tensor cores have one tile for up to 16 tokens."""
    found = [(most, best(problem, kinds, most, card)) for most, kinds in BOUNDS]
    return [x for x in found if not (x[0] == 4 and x[1].kind == "dot")]
