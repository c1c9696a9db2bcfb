"""What a configuration of a linear costs: microseconds, from bytes, operations and occupancy.

Microseconds = launch + programs started in waves + the larger of bytes over what the card can draw
and operations over what it can do. A kernel draws the full bandwidth only with enough bytes in
flight (Little's law: bandwidth times latency) and with work on every multiprocessor. How many
programs a multiprocessor holds is what the compiler reports of the kernel (occupancy.py); before it
has, an estimate: the fixed numbers in `_estimated` are of kernels seen compiled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aios_compile.codegen.triton.cards import LATENCY_US, LAUNCH_US, Card
from aios_compile.codegen.triton.configs import Config, Problem, sums
from aios_compile.codegen.triton.occupancy import MOST_PROGRAMS, Occupancy, Usage, occupancy

OVERLAP_LOSS = 0.05  # of the parts that the longest one hides
L2_FACTOR = 1.5  # what L2 delivers, relative to memory


@dataclass(frozen=True)
class Cost:
    """Microseconds of one call and what they are made of; infinite where it spills or does not fit.

    memory: weights from memory; staged: weights and x from L2; compute: products; combine: the
    parts' sums; start: the launch and its waves. reported: the compiler's occupancy, no estimate.
    """

    us: float
    memory: float
    staged: float
    compute: float
    combine: float
    start: float
    held: Occupancy
    reported: bool

    def bound(self) -> str:
        """Return the name of the longest part."""
        parts = {"memory": self.memory, "staging": self.staged, "products": self.compute}
        return max(parts, key=lambda name: parts[name])

    def text(self) -> str:
        """Return the cost in words."""
        by = "compiler" if self.reported else "estimate"
        return (
            f"{self.us:.1f} us by {self.bound()} (memory {self.memory:.1f}, staging "
            f"{self.staged:.1f}, products {self.compute:.1f}, start {self.start:.1f}), "
            f"{self.held.programs} programs a multiprocessor by {self.held.limit} ({by})"
        )


def cost_us(c: Config, p: Problem, tokens: int, card: Card) -> float:
    """Return the model's microseconds for `tokens` rows, by the estimated occupancy."""
    return cost(c, p, tokens, card).us


def cost(c: Config, p: Problem, tokens: int, card: Card, usage: Usage | None = None) -> Cost:
    """Return what `tokens` rows cost. usage: what the compiler says that a program uses."""
    held = occupancy(usage, card) if usage else _estimated(c, p, card)
    unfit = usage is not None and (usage.spill_bytes > 0 or held.programs == 0)
    resident = max(1, held.programs)
    across = math.ceil(p.columns / c.block_n)
    down = 1 if c.kind != "tile" else math.ceil(tokens / c.block_t)
    programs = across * down * c.split
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
    compute = flops / _rate(c, card) * (full if c.kind == "tile" else 1.0)
    combine = 0.0
    if c.split > 1:
        sums_bytes = 8.0 * c.split * tokens * p.columns * p.streams
        combine = 3 * LATENCY_US + sums_bytes / card.bytes_per_us
    parts, start = (memory, staged, compute), LAUNCH_US + waves * LATENCY_US
    us = math.inf if unfit else start + max(parts) + OVERLAP_LOSS * sum(parts) + combine
    return Cost(us, memory, staged, compute, combine, start, held, usage is not None)


def _rate(c: Config, card: Card) -> float:
    """Return operations a microsecond: of the vector units for rows, else a share of the peak; a
    tile's grows with its operations for each byte that it stages.
    """
    if c.kind == "rows":
        return card.flops_per_us / 16
    if c.kind != "tile":
        return card.flops_per_us * 0.4
    intensity = c.block_t * c.block_n / (c.block_t + c.block_n)
    return card.flops_per_us * min(1.0, intensity / 64) * (0.85 if c.block_k < 64 else 1.0)


def _estimated(c: Config, p: Problem, card: Card) -> Occupancy:
    """Return how many programs a multiprocessor may hold, before the compiler has said so."""
    threads = c.num_warps * card.warp
    if c.kind == "rows":
        registers = 32 + sums(c, p, card) * (c.block_t + 1)
        shared = 1024.0
    else:
        registers = 48 + c.block_t * c.block_n * p.streams // threads
        step = c.block_n * p.streams * p.weight_bytes + c.block_t * p.x_bytes
        shared = max(1, c.num_stages - 1) * c.block_k * step
    limits = {
        "programs": MOST_PROGRAMS,
        "threads": card.threads // threads,
        "registers": card.registers // (min(255, registers) * threads),
        "shared memory": int(card.shared_bytes // shared),
    }
    name = min(limits, key=lambda n: limits[n])
    return Occupancy(max(1, limits[name]), name)
