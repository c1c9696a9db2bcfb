"""The number of drafts follows what a step costs and what drafts yield."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from aios_compile.runtime.draft_governor import DraftGovernor, Kind


def simulate(
    governor: DraftGovernor,
    num_steps: int,
    *,
    num_sequences: int = 1,
    weights_us: float,
    token_us: float,
    chance: float,
    noise: float = 0.3,
) -> tuple[Counter[int], float]:
    """Return how often each level was chosen and the tokens a microsecond."""
    rng, chosen, tokens, micros = random.Random(1), Counter[int](), 0, 0.0
    for _ in range(num_steps):
        most = governor.choose(num_sequences)
        chosen[most] += 1
        accepted = 0
        for _ in range(num_sequences):
            run = 0
            while run < most and rng.random() < chance:
                run += 1
            if most:
                governor.acceptance.saw(most, run)
            accepted += run
        step_us = weights_us + token_us * num_sequences * (1 + most)
        measured_us = step_us * (1 + noise * rng.random())
        measured_us *= 10 if rng.random() < noise else 1  # another program took the core
        governor.measure(num_sequences * (1 + most), num_sequences * (most > 0), most, measured_us)
        tokens, micros = tokens + num_sequences + accepted, micros + step_us
    return chosen, tokens / micros


@pytest.mark.parametrize(
    ("weights_us", "token_us", "chance", "best"),
    [
        (1000, 10, 0.9, 8),  # weights are the time: verify as much as may come true
        (100, 100, 0.9, 3),  # arithmetic is: fewer
        (100, 100, 0.7, 1),
        (100, 100, 0.2, 0),  # and drafts that do not come true never pay
        (1000, 10, 0.0, 0),
        (300, 60, 0.75, 3),
    ],
)
def test_the_level_that_pays_is_used_nearly_always(
    weights_us: float, token_us: float, chance: float, best: int
) -> None:
    governor = DraftGovernor(8)
    assert governor.levels == (0, 1, 3, 7, 8)
    costs = {"weights_us": weights_us, "token_us": token_us, "chance": chance}
    chosen, rate = simulate(governor, 3000, **costs)  # type: ignore[arg-type]
    rates = []
    for level in governor.levels:
        tokens = sum(chance**i for i in range(level + 1))
        rates.append(tokens / (weights_us + token_us * (1 + level)))
    assert max(rates) == rates[governor.levels.index(best)]
    assert rate > 0.9 * max(rates), (chosen, rates)


def test_it_changes_its_mind_when_costs_change() -> None:
    governor = DraftGovernor(3)
    first, _ = simulate(governor, 500, weights_us=0.0, token_us=100.0, chance=0.8)
    assert first.most_common(1)[0][0] == 0
    later, _ = simulate(governor, 1000, weights_us=3000.0, token_us=100.0, chance=0.8)
    assert later.most_common(1)[0][0] == 3


def test_sizes_of_batches_are_judged_apart() -> None:
    governor = DraftGovernor(3)
    costs = {"weights_us": 3000.0, "token_us": 200.0, "chance": 0.5}
    alone, _ = simulate(governor, 600, num_sequences=1, **costs)  # type: ignore[arg-type]
    many, _ = simulate(governor, 600, num_sequences=40, **costs)  # type: ignore[arg-type]
    assert alone.most_common(1)[0][0] == 3 and many.most_common(1)[0][0] == 0
    told = str(governor)
    assert told.startswith("drafts a sequence: 3 for up to 1 (1: ")
    assert ", 0 for up to 63 (1: " in told and "3: 3." in told and "x the time for 1." in told


@pytest.mark.parametrize("chance", [0.0, 0.4])
def test_drafts_that_cost_five_times_a_step_lose_little(chance: float) -> None:
    """A draft model that does not pay: after the first look, trials lose 3 % at most."""
    governor = DraftGovernor(5)
    costs = {"weights_us": 100.0, "token_us": 200.0, "chance": chance, "noise": 0.0}
    simulate(governor, 100, **costs)  # type: ignore[arg-type]
    chosen, rate = simulate(governor, 4000, **costs)  # type: ignore[arg-type]
    assert rate > 0.97 / 300.0 and 8 <= 4000 - chosen[0] < 80, chosen


def test_a_step_that_was_not_measured_changes_nothing() -> None:
    governor = DraftGovernor(3)
    first = governor.choose(1)
    assert governor.choose(1) == first == 3, "not measured: it is tried again"
    governor.measure(4, 1, 3, 10.0)
    governor.measure(4, 1, 3, 1.0)  # nothing was chosen for it
    assert governor._cost.micros(Kind(4, 3)) == 10.0


def test_steps_without_a_draft_are_no_trial() -> None:
    """Prompt lookup finds nothing for a while: drafts are tried when it does."""
    governor = DraftGovernor(3)
    for _ in range(50):
        assert governor.choose(1) == 3
        governor.measure(1, 0, 0, 100.0)
    assert str(governor) == "drafts a sequence: 0 for up to 1"
