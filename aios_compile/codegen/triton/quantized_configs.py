"""Configurations of a linear on quantised rows: enumerated from its sizes and what fits the card.

choice.py picks one for each range of rows, as for linear.py. The bounds on what a thread holds are
those of blocks that compile without spills on every target and format (tests/nightly:
test_triton_matrix.py, test_triton_models.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from aios_compile.codegen.triton.cards import Card
from aios_compile.codegen.triton.configs import Config, Problem, Ranges

STRIP = 16  # bytes of codes that a thread reads at once
SPLITS = (1, 2, 4, 8)
BLOCKS = (16, 32, 64)  # columns of a tile
MOST_LOADS = 2  # strips of a stream that a thread holds
MOST_WEIGHTS, MOST_FACTORS, MOST_SUMS = 16, 24, 64  # float32 values that a thread holds


def ranges(problem: Problem, strip_codes: int, card: Card) -> Ranges:
    """Return (row bound, configurations) of quantized_linear. strip_codes: codes of 16 bytes.

    Tiles of many tokens hold half as many where factors live in registers, and more stages where
    two spill.
    """
    halves = strip_codes // STRIP
    rows = [
        Config("rows", 1, columns, strips * strip_codes, warps, 2, split)
        for warps, columns, strips, split in itertools.product(
            card.warps, (2, 4, 8, 16), (16, 32, 64), SPLITS
        )
        if columns * strips in (warps * card.warp, MOST_LOADS * warps * card.warp)
        and 4 * strips >= warps * card.warp  # 16 bytes of x a thread, or it changes threads
    ]
    # With three, two streams without a norm spill on gfx942 (16 bytes, int4).
    ahead = (2,) if card.warp == 64 and problem.streams > 1 and not problem.normed else (2, 3)
    few = [
        [
            Config("dot", tokens, columns, strips * strip_codes, 4, stages, split)
            for columns, strips, stages, split in itertools.product(
                BLOCKS, (2, 4, 8), ahead, SPLITS
            )
        ]
        for tokens in (16, 32)
    ]
    tokens = 64 if card.async_dots else 32
    stages = (3,) if problem.normed and not card.async_dots else (2, 3)
    many = [
        Config("tile", tokens, 64, strips * strip_codes, 4, count)
        for strips, count in itertools.product((2, 4), stages)
    ]
    dots = [
        [c for c in found if _held(c, halves, problem, card) and loads_strips(c, strip_codes, card)]
        for found in few
    ]
    tiles = [c for c in many if _held(c, halves, problem, card)]
    return _of_depth(problem, rows, *dots, tiles)


def float_ranges(problem: Problem, group: int, card: Card) -> Ranges:
    """Return (row bound, configurations) of fp8_linear, whose step of k is a group of the format.

    Its rows read ahead; products are on the tensor cores, whose sums a group's scale takes.
    """
    rows = [
        Config("rows", 1, columns, 32 * STRIP, 4, 3, split)
        for columns, split in itertools.product((4, 8), SPLITS)
    ]
    few = [
        [
            Config("dot", tokens, columns, group, 4, stages, split)
            for columns, stages, split in itertools.product((16, 32), (2, 3), SPLITS)
        ]
        for tokens in (16, 32)
    ]
    many = [Config("tile", 64, 64, group, 8, stages) for stages in (2, 3)]
    return _of_depth(problem, rows, *few, many)


def loads_strips(c: Config, strip_codes: int, card: Card) -> bool:
    """Return whether a step has 16 bytes of codes of a stream for each thread: else it reads 8."""
    return c.block_n * c.block_k // strip_codes >= c.num_warps * card.warp


def _held(c: Config, halves: int, p: Problem, card: Card) -> bool:
    """Return whether a thread holds a half byte's weights and activations, and its sums."""
    threads = c.num_warps * card.warp
    weights = c.block_n * c.block_k // halves // threads
    factors = weights + c.block_t * c.block_k // halves // threads
    sums = c.block_t * c.block_n * p.streams // threads
    most = MOST_FACTORS if c.kind == "dot" else 2 * MOST_WEIGHTS
    return weights <= MOST_WEIGHTS and factors <= most and sums <= min(MOST_SUMS, card.sums)


def _of_depth(problem: Problem, *found: Iterable[Config]) -> Ranges:
    """Return the ranges; each part of a shared depth has at least one whole step, and the last step
    is a whole one where it can be: lanes that do nothing cost as much, and masks registers.
    """
    kept = [[c for c in x if c.split == 1 or c.block_k * c.split <= problem.depth] for x in found]
    kept[0] = [c for c in kept[0] if problem.depth % c.block_k == 0] or kept[0]
    return tuple(zip((1, 16, 32, None), kept))
