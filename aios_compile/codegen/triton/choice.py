"""Choose a configuration for each range of rows, and say why.

By the model alone the best estimate wins. With the compiler's report the search is best first: the
cheapest configuration is compiled; if it spills it is out, else its cost is known by its true
occupancy; it wins as soon as no other's estimate is below it. Estimates that are too low cost a
compilation each, and only those; `limit` bounds them. A tie goes to the first: deterministic.
Tiles of up to 32 rows add over k in one order, that of the choice for 32 (docs/targets.md).
What was measured on this GPU before (kernel_ledger.py) comes first; where nothing was, the nearest
configurations that give the same bits are what select_kernels may time.
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
from aios_compile.codegen.triton.kernel_ledger import Entry, KernelLedger
from aios_compile.codegen.triton.occupancy import Usage

Report = Callable[[Sequence[KernelSource]], Sequence[Usage]]
Build = Callable[[Config], KernelSource]
Also = Callable[[Config], Config | None]
FEW, FEWER = 32, (4, 16)  # bounds of the tiles that share an order, the first decides


NEAR = 1.5  # times the estimate of the choice: what is further off is not worth a compilation


@dataclass(frozen=True)
class Tuning:
    """Whom to ask beside the model.

    report, limit: the compiler, about so many configurations of a variant. ledger: what was
    measured on this GPU. timed: how many more of a variant without such an entry become candidates.
    """

    report: Report | None = None
    limit: int = 0
    ledger: KernelLedger | None = None
    timed: int = 0


@dataclass(frozen=True)
class Choice:
    """What serves up to `most` rows. among: how many configurations fit; compiled: of how many the
    compiler has reported; spilled: how many of those were out. second: the next best, if any.
    others: candidates with the same bits. entry: of the ledger, if that decided.
    """

    most: int | None
    config: Config
    cost: Cost
    among: int
    compiled: int = 0
    spilled: int = 0
    second: tuple[Config, float] | None = None
    others: tuple[Config, ...] = ()
    entry: Entry | None = None

    def text(self) -> str:
        """Return the choice and its reasons in one line."""
        rows = "any number of rows" if self.most is None else f"up to {self.most} rows"
        if self.entry is not None:
            return f"{rows}: {self.config.text()}: {self.entry.text()}"
        told = f"{rows}: {self.config.text()}: {self.cost.text()}; best of {self.among}"
        if self.compiled:
            told += f", {self.compiled} compiled, {self.spilled} of them spill"
        if self.second is not None:
            config, us = self.second
            told += f"; next {config.text()}, {us:.1f} us"
        return told


@dataclass
class Search:
    """The configurations of one range of rows, and what is known of them. Owns `usage`.

    entry: of the ledger. also: another form of a configuration, which only the clock may choose.
    """

    problem: Problem
    found: Sequence[Config]
    most: int | None
    card: Card
    usage: dict[Config, Usage] = field(default_factory=dict)
    entry: Entry | None = None
    also: Also = lambda config: None

    def __post_init__(self) -> None:
        self.tokens = PREFILL_TOKENS if self.most is None else self.most

    def measured(self) -> Config | None:
        """Return what the ledger says; None without an entry, or if that is no choice any more."""
        if self.entry is None:
            return None
        every = (*self.found, *filter(None, map(self.also, self.found)))
        return next((c for c in every if c.text() == self.entry.choice), None)

    def others(self, chosen: Config, count: int) -> tuple[Config, ...]:
        """Return the best that give the same bits as the choice, by the model; of the choice also
        its other form, which the model knows nothing of.
        """
        most = NEAR * self.cost(chosen).us
        same = [c for c in self.found if c != chosen and c.bits == chosen.bits]
        best = sorted((c for c in same if self.cost(c).us <= most), key=self._us)[:count]
        other = self.also(chosen) if count else None
        return (*best, *(() if other is None else (other,)))

    def _us(self, config: Config) -> float:
        return self.cost(config).us

    def keep_order(self, other: Config) -> None:
        """Leave out tiles that add over k in another order than a configuration."""
        self.found = [c for c in self.found if c.kind == "rows" or c.order == other.order]

    def cost(self, config: Config) -> Cost:
        return cost(config, self.problem, self.tokens, self.card, self.usage.get(config))

    def best(self) -> Config:
        return min(self.found, key=lambda c: self.cost(c).us)

    def unknown(self, limit: int) -> Config | None:
        """Return what to compile next: the best, unless it is known, or enough is."""
        if self.measured() is not None:
            return None
        best = self.best()
        fitting = any(math.isfinite(self.cost(c).us) for c in self.usage)
        enough = fitting and len(self.usage) >= limit
        return None if best in self.usage or enough else best

    def choice(self, timed: int = 0) -> Choice:
        """Return what was measured, or the best of those that are known, or if none is, of all.

        timed: how many others to name beside a choice that was not measured.
        """
        if (measured := self.measured()) is not None:
            cost, among = self.cost(measured), len(self.found)
            return Choice(self.most, measured, cost, among, entry=self.entry)
        known = [c for c in self.found if c in self.usage] or self.found
        ranked = sorted(known, key=lambda c: self.cost(c).us)
        rest = [c for c in self.found if c != ranked[0] and math.isfinite(self.cost(c).us)]
        second = min(rest, key=lambda c: self.cost(c).us, default=None)
        spilled = sum(math.isinf(self.cost(c).us) for c in self.usage)
        return Choice(
            self.most, ranked[0], self.cost(ranked[0]), len(self.found), len(self.usage), spilled,
            None if second is None else (second, self.cost(second).us),
            self.others(ranked[0], timed),
        )  # fmt: skip


def choose(
    problem: Problem,
    card: Card,
    tuning: Tuning | None = None,
    build: Build | None = None,
    found: Ranges | None = None,
    name: str = "linear",
    also: Also = lambda config: None,
) -> list[Choice]:
    """Return the choice of each variant; a bound that the next one serves is left out: tensor cores
    have one tile for up to 16 tokens.

    tuning: asks the compiler, about more than its limit only while all spill; build: the kernel of
    a configuration, needed then. found: the configurations, if not those of a linear on floats.
    name: the emitter's, in the ledger. also: see Search.
    """
    given = ranges(problem, card) if found is None else found
    searches = {most: Search(problem, every, most, card, also=also) for most, every in given}
    if tuning is not None and tuning.ledger is not None:
        for search in searches.values():
            search.entry = tuning.ledger.entry(problem.signature(name), search.most)
    known: dict[Config, Usage] = {}  # two ranges may ask for one configuration
    _ask([s for s in searches.values() if s.most not in FEWER], tuning, build, known)
    fewer = [searches[most] for most in FEWER if most in searches]
    if FEW in searches:
        for search in fewer:
            search.keep_order(searches[FEW].choice().config)
    _ask(fewer, tuning, build, known)
    timed = 0 if tuning is None else tuning.timed
    made = [search.choice(timed) for search in searches.values()]
    return [x for x in made if not (x.most == 4 and x.config.kind == "dot")]


def _ask(
    searches: Sequence[Search],
    tuning: Tuning | None,
    build: Build | None,
    known: dict[Config, Usage],
) -> None:
    """Let the compiler report until each search knows its best."""
    while tuning is not None and tuning.report is not None:
        assert build is not None, "a report is of kernels"
        wanted = [(s, c) for s in searches if (c := s.unknown(tuning.limit)) is not None]
        if not wanted:
            break
        new = list(dict.fromkeys(c for _, c in wanted if c not in known))
        known |= zip(new, tuning.report([build(c) for c in new]))
        for search, config in wanted:
            search.usage[config] = known[config]
