"""How many drafts pay, measured while the engine runs.

Verifying k drafts costs what a step of 1 + k tokens costs more than one of 1: nothing where weights
are the time, nearly k times as much where arithmetic is (a busy batch, a small model). What they
yield is how often the first, the second, ... comes true. Both are measured, and each step uses the
level of drafts with the most tokens a microsecond: none at all if they do not pay. The example
checkpoint with prompt lookup on repetitive text, one sequence and one thread (as measured here)::

    level (most drafts a sequence)       0       1       3       7
    microseconds a step                325     546     714    1373
    tokens a second                   3081    3521  [5130]    4978

Levels are 2^n - 1: with the token that is sampled anyway a tile of the CPU's linear kernels holds
four rows. Only lengths depend on the clock, and they go to the scheduler with the event; tokens
never do.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

NUM_TRIAL_STEPS = 4  # of a level in a row, when nothing is known and when it is tried again
STEPS_BETWEEN_TRIALS = 200  # at least: 2 % of the steps are trials
TRIAL_SHARE = 0.02  # of the time, at most, may be lost by trials of what does not pay
SLOWLY = 0.02
DECAY = 0.98  # of an observation, with each further one: about the last 50 count


class Acceptance:
    """How often the i-th draft comes true if those before it have: of all sequences together."""

    def __init__(self, most: int) -> None:
        self._chances = [0.7] * most  # a guess that the first observations replace

    def saw(self, proposed: int, accepted: int) -> None:
        """Take in one verification."""
        for place in range(min(proposed, accepted + 1)):
            came_true = float(place < accepted)
            self._chances[place] = DECAY * self._chances[place] + (1 - DECAY) * came_true

    def tokens(self, num_drafts: int) -> float:
        """Return the expected number of drafts that come true."""
        total, chance = 0.0, 1.0
        for place in range(num_drafts):
            chance *= self._chances[place]
            total += chance
        return total


class Kind(NamedTuple):
    """What the time of a step depends on: tokens through the model, and the longest draft."""

    num_computed: int
    num_drafted: int


class StepCost:
    """What a step of a kind takes when nothing disturbs it: other programs only ever add to it.

    A quicker step is believed at once, a slower one a little at a time.
    """

    def __init__(self) -> None:
        self._micros: dict[Kind, float] = {}
        self._counts: Counter[Kind] = Counter()

    def update(self, kind: Kind, micros: float) -> int:
        """Take in one step; return how many of its kind there were."""
        known = self._micros.get(kind, micros)
        self._micros[kind] = min(micros, known + SLOWLY * (micros - known))
        self._counts[kind] += 1
        return self._counts[kind]

    def micros(self, kind: Kind) -> float:
        return self._micros[kind]


class _Use(NamedTuple):
    """A step at some level: its kind, its sequences, and those of them that had drafts."""

    kind: Kind
    num_sequences: int
    num_drafting: int


class _Levels:
    """Of one size of batch: the last step at each level, and which level is tried now."""

    def __init__(self, count: int) -> None:
        self.uses: list[_Use | None] = [None] * count
        self.trial = count - 1  # drafts first: they are what was asked for
        self.num_left = NUM_TRIAL_STEPS
        self.num_since = 0
        self.lost_us = 0.0  # by this trial, against the best level
        self.pause = STEPS_BETWEEN_TRIALS  # before the next one


class DraftGovernor:
    """Chooses the level for each step. `choose`, then `measure` if the step was decodes only."""

    def __init__(self, most: int) -> None:
        small = [(1 << n) - 1 for n in range(most.bit_length() + 1) if (1 << n) - 1 < most]
        self.levels = (*small, most)
        self.acceptance = Acceptance(most)
        self._cost = StepCost()
        self._sizes: dict[int, _Levels] = {}  # by the size of the batch, in powers of two
        self._chosen: tuple[_Levels, int, int] | None = None
        self.is_trying = False  # the step that was chosen for last is a trial: at full length

    def choose(self, num_sequences: int) -> int:
        """Return the most drafts that a sequence may have in a step of so many."""
        size = num_sequences.bit_length()
        if size not in self._sizes:
            self._sizes[size] = _Levels(len(self.levels))
        levels = self._sizes[size]
        self.is_trying = levels.num_left > 0
        level = levels.trial if levels.num_left else self._next_level(levels)
        self._chosen = levels, level, num_sequences
        return self.levels[level]

    def _next_level(self, levels: _Levels) -> int:
        unknown = [i for i, use in enumerate(levels.uses) if use is None]
        best = self._best(levels)
        levels.num_since += 1
        if not unknown and levels.num_since <= levels.pause:
            return best
        others = [i for i in range(len(self.levels)) if i != best]
        if unknown:
            levels.trial = unknown[-1]
        else:
            levels.trial = next((i for i in others if i > levels.trial), others[0])
        levels.num_left, levels.num_since, self.is_trying = NUM_TRIAL_STEPS, 0, True
        levels.lost_us = 0.0
        return levels.trial

    def _best(self, levels: _Levels) -> int:
        values = [-1.0 if use is None else self._value(use) for use in levels.uses]
        return max(range(len(values)), key=values.__getitem__)

    def _value(self, use: _Use) -> float:
        """Return the expected tokens a microsecond."""
        return self._tokens(use) / self._cost.micros(use.kind)

    def _tokens(self, use: _Use) -> float:
        """Return the expected tokens of such a step."""
        drafts = use.num_drafting * self.acceptance.tokens(use.kind.num_drafted)
        return use.num_sequences + drafts

    def measure(
        self, num_computed: int, num_drafting: int, num_drafted: int, micros: float
    ) -> None:
        """Take in the step that was chosen for last: its time with all that drafts cost.

        num_computed tokens went through the model; num_drafting sequences had drafts, at most
        num_drafted of them. A level without a draft in its step (none was found) says nothing.
        """
        if self._chosen is None:
            return
        levels, level, num_sequences = self._chosen
        self._chosen = None
        kind = Kind(num_computed, num_drafted)
        count = self._cost.update(kind, micros)
        if level and not num_drafted:
            return
        if levels.num_left:
            self._account(levels, _Use(kind, num_sequences, num_drafting))
        levels.num_left = max(0, levels.num_left - 1)
        if num_drafted < self.levels[level] and levels.uses[level] is not None:
            return  # lengths were shorter for another reason: that is not this level's step
        # one step may have been disturbed; of three one was probably not
        if count >= 3 or levels.uses[level] is None:
            levels.uses[level] = _Use(kind, num_sequences, num_drafting)

    def _account(self, levels: _Levels, use: _Use) -> None:
        """Note what a step of a trial lost; the next trial waits until that is a small share."""
        best = levels.uses[self._best(levels)]
        if best is None:
            return
        # not what this step took: another program may have had the core
        levels.lost_us += max(
            0.0, self._cost.micros(use.kind) - self._tokens(use) / self._value(best)
        )
        steps = levels.lost_us / (TRIAL_SHARE * self._cost.micros(best.kind))
        levels.pause = max(STEPS_BETWEEN_TRIALS, int(steps))

    def __str__(self) -> str:
        """Return for each size of batch the level in use, and what the others cost and yield."""
        parts = [
            f"{self.levels[self._best(levels)]} for up to {(1 << size) - 1}{self._why(levels)}"
            for size, levels in sorted(self._sizes.items())
        ]
        return "drafts a sequence: " + (", ".join(parts) or "not measured yet")

    def _why(self, levels: _Levels) -> str:
        plain = levels.uses[0]
        if plain is None:
            return ""
        base_us, base = self._cost.micros(plain.kind), self._tokens(plain)
        told = [
            f"{most}: {self._cost.micros(use.kind) / base_us:.2f}x the time for "
            f"{self._tokens(use) / base:.2f}x the tokens"
            for most, use in zip(self.levels, levels.uses)
            if most and use is not None
        ]
        return f" ({'; '.join(told)})" if told else ""
