"""Configurations of a linear on quantised rows: how many programs share a tile's depth.

Blocks and warps are those that compile without spills on every target and format
(tests/nightly/test_triton_matrix.py); the number of parts is what cost_model.py likes best. It
depends on the sizes and the card, never on T: all tiles of up to 32 tokens have the same step of k
and the same parts, so that a token's sums are made in one order whatever the others are.
"""

from __future__ import annotations

from dataclasses import replace

from aios_compile.codegen.triton.cards import Card
from aios_compile.codegen.triton.configs import Config, Problem
from aios_compile.codegen.triton.cost_model import cost, cost_us

STRIP = 16  # bytes of codes that a thread reads at once
SPLITS = (1, 2, 4, 8)
FEW_TOKENS = 16  # for which the parts of a tile are chosen


def choose(problem: Problem, strip_codes: int, card: Card) -> list[tuple[int | None, Config]]:
    """Return (row bound, configuration) of each variant of quantized_linear.

    strip_codes: codes of 16 bytes. Tiles of many tokens hold half as many where factors live in
    registers, and more stages where two spill.
    """
    warps = card.warps[0]
    row = Config("rows", 1, 2 * warps, 32 * strip_codes, warps, 2)
    tile = Config("tiles", FEW_TOKENS, 32, 4 * strip_codes, 4, 2)
    many = replace(tile, block_t=64 if card.async_dots else 32, block_n=64, block_k=2 * strip_codes)
    many = replace(many, num_stages=3 if problem.normed and not card.async_dots else 2)
    return with_parts(problem, row, tile, replace(tile, block_t=32, block_n=16), many, card)


def with_parts(
    problem: Problem, row: Config, tile: Config, wide: Config, many: Config, card: Card
) -> list[tuple[int | None, Config]]:
    """Return the variants for 1, 16, 32 and any number of tokens, all but the last with parts."""
    assert tile.block_k == wide.block_k, "a row's bits must not depend on the number of tokens"
    row = replace(row, split=_parts(problem, row, card))
    split = _parts(problem, tile, card)
    few = [(16, replace(tile, split=split)), (32, replace(wide, split=split))]
    return [(1, row), *few, (None, many)]


def reasons(problem: Problem, chosen: list[tuple[int | None, Config]], card: Card) -> list[str]:
    """Return why each variant with parts has as many, a line each."""
    lines = []
    for most, config in chosen[:-1]:
        kind = replace(config, kind="rows" if config.kind == "rows" else "dot")
        told = cost(kind, problem, config.block_t, card).text()
        lines.append(f"up to {most} rows: {config.split} parts of the depth: {told}")
    return lines


def _parts(problem: Problem, config: Config, card: Card) -> int:
    """Return the best number of parts; each has at least one whole step of the depth."""
    kind = "rows" if config.kind == "rows" else "dot"
    found = [
        replace(config, kind=kind, split=split)
        for split in SPLITS
        if split == 1 or config.block_k * split <= problem.depth
    ]
    return min(found, key=lambda c: cost_us(c, problem, c.block_t, card)).split
