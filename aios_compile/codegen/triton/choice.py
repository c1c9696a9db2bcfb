"""Choose a configuration for each range of rows, and say why.

By the model alone the best estimate wins. With the compiler's report the search is best first: the
cheapest configuration is compiled; if it spills it is out, else its cost is known by its true
occupancy; it wins as soon as no other's estimate is below it. Estimates that are too low cost a
compilation each, and only those; `limit` bounds them. A tie goes to the first: deterministic.
Tiles of up to 32 rows add over k in one order, that of the choice for 32 (docs/targets.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.cards import Card
from aios_compile.codegen.triton.configs import (
    PREFILL_TOKENS,
    Config,
    Problem,
    Ranges,
    ranges,
)
from aios_compile.codegen.triton.cost_model import Cost, cost
from aios_compile.codegen.triton.occupancy import Usage

Report = Callable[[Sequence[KernelSource]], Sequence[Usage]]
Build = Callable[[Config], KernelSource]
FEW, FEWER = 32, (4, 16)  # bounds of the tiles that share an order, the first decides


@dataclass(frozen=True)
class Tuning:
    """Whom to ask what a kernel uses, and of how many configurations of a variant."""

    report: Report
    limit: int


@dataclass(frozen=True)
class Choice:
    """What serves up to `most` rows. among: how many configurations fit; compiled: of how many the
    compiler has reported; spilled: how many of those were out. second: the next best, if any.
    """

    most: int | None
    config: Config
    cost: Cost
    among: int
    compiled: int = 0
    spilled: int = 0
    second: tuple[Config, float] | None = None

    def text(self) -> str:
        """Return the choice and its reasons in one line."""
        rows = "any number of rows" if self.most is None else f"up to {self.most} rows"
        told = f"{rows}: {_short(self.config)}: {self.cost.text()}; best of {self.among}"
        if self.compiled:
            told += f", {self.compiled} compiled, {self.spilled} of them spill"
        if self.second is not None:
            config, us = self.second
            told += f"; next {_short(config)}, {us:.1f} us"
        return told


def _short(c: Config) -> str:
    split = f" split {c.split}" if c.split > 1 else ""
    stages = f" {c.num_stages} stages" if c.kind != "rows" else ""
    return f"{c.kind} {c.block_t}x{c.block_n}x{c.block_k} {c.num_warps} warps{stages}{split}"


@dataclass
class Search:
    """The configurations of one range of rows, and what is known of them. Owns `usage`."""

    problem: Problem
    found: Sequence[Config]
    most: int | None
    card: Card
    usage: dict[Config, Usage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = PREFILL_TOKENS if self.most is None else self.most

    def keep_order(self, other: Config) -> None:
        """Leave out tiles that add over k in another order than a configuration."""
        self.found = [c for c in self.found if c.kind == "rows" or c.order == other.order]

    def cost(self, config: Config) -> Cost:
        return cost(config, self.problem, self.tokens, self.card, self.usage.get(config))

    def best(self) -> Config:
        return min(self.found, key=lambda c: self.cost(c).us)

    def unknown(self, limit: int) -> Config | None:
        """Return what to compile next: the best, unless it is known, or enough is."""
        best = self.best()
        fitting = any(math.isfinite(self.cost(c).us) for c in self.usage)
        enough = fitting and len(self.usage) >= limit
        return None if best in self.usage or enough else best

    def choice(self) -> Choice:
        """Return the best of those that are known, or if none is, of all."""
        known = [c for c in self.found if c in self.usage] or self.found
        ranked = sorted(known, key=lambda c: self.cost(c).us)
        rest = [c for c in self.found if c != ranked[0] and math.isfinite(self.cost(c).us)]
        second = min(rest, key=lambda c: self.cost(c).us, default=None)
        spilled = sum(math.isinf(self.cost(c).us) for c in self.usage)
        return Choice(
            self.most, ranked[0], self.cost(ranked[0]), len(self.found), len(self.usage), spilled,
            None if second is None else (second, self.cost(second).us),
        )  # fmt: skip


def choose(
    problem: Problem,
    card: Card,
    tuning: Tuning | None = None,
    build: Build | None = None,
    found: Ranges | None = None,
) -> list[Choice]:
    """Return the choice of each variant; a bound that the next one serves is left out: tensor cores
    have one tile for up to 16 tokens.

    tuning: asks the compiler, about more than its limit only while all spill; build: the kernel of
    a configuration, needed then. found: the configurations, if not those of a linear on floats.
    """
    given = ranges(problem, card) if found is None else found
    searches = {most: Search(problem, every, most, card) for most, every in given}
    known: dict[Config, Usage] = {}  # two ranges may ask for one configuration
    _ask([s for s in searches.values() if s.most not in FEWER], tuning, build, known)
    fewer = [searches[most] for most in FEWER if most in searches]
    if FEW in searches:
        for search in fewer:
            search.keep_order(searches[FEW].choice().config)
    _ask(fewer, tuning, build, known)
    made = [search.choice() for search in searches.values()]
    return [x for x in made if not (x.most == 4 and x.config.kind == "dot")]


def _ask(
    searches: Sequence[Search],
    tuning: Tuning | None,
    build: Build | None,
    known: dict[Config, Usage],
) -> None:
    """Let the compiler report until each search knows its best."""
    while tuning is not None:
        assert build is not None, "a report is of kernels"
        wanted = [(s, c) for s in searches if (c := s.unknown(tuning.limit)) is not None]
        if not wanted:
            break
        new = list(dict.fromkeys(c for _, c in wanted if c not in known))
        known |= zip(new, tuning.report([build(c) for c in new]))
        for search, config in wanted:
            search.usage[config] = known[config]
