"""Whether steps are begun ahead, by what it is worth here and now: decided by the clock.

Beginning a step ahead saves the host's time and costs a hand-over between two threads. With a core
for each that is a clear gain; beside other programs the second thread may wait for a core, and a
small step then takes twice as long. So a few steps are timed each way, and the better way is kept
for a while: steps ahead, unless they clearly lose, as what is gained is small beside the noise of
a few steps. Sizes are judged apart: large steps gain where small ones lose.

Means are compared, not medians: a host that comes late makes one step long and the next one short.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

TRIAL_STEPS = 16  # each way
BLOCK_STEPS = 8  # of one way, before the other has its turn
KEPT_STEPS = 480  # so that at most one step in 30 is a trial of the worse way
LEAST_LOSS = 1.08  # steps ahead are given up when they take so many times as long


@dataclass
class _Size:
    """Batches of about one size. choice: what is kept now, None while it is tried."""

    ahead_us: list[float] = field(default_factory=list)
    plain_us: list[float] = field(default_factory=list)
    choice: bool | None = None
    num_left: int = 0  # steps until the next trial


class OverlapGovernor:
    """Decides for each number of sequences, in powers of two."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def wants(self, num_sequences: int) -> bool:
        """Return whether the step after the present one is to be begun ahead."""
        size = self._of(num_sequences)
        if size.choice is not None:
            return size.choice
        plain, ahead = len(size.plain_us), len(size.ahead_us)
        return plain >= TRIAL_STEPS or (plain >= BLOCK_STEPS and ahead < BLOCK_STEPS)

    def measure(self, num_sequences: int, was_ahead: bool, micros: float) -> None:
        """Take in the time from the end of one decode step to the end of the next."""
        size = self._of(num_sequences)
        if size.choice is not None:
            size.num_left -= 1
            if size.num_left <= 0:
                size.choice = None
            return
        times = size.ahead_us if was_ahead else size.plain_us
        if len(times) < TRIAL_STEPS:
            times.append(micros)
        if min(len(size.ahead_us), len(size.plain_us)) == TRIAL_STEPS:
            size.choice = fmean(size.ahead_us) < LEAST_LOSS * fmean(size.plain_us)
            size.num_left = KEPT_STEPS
            size.ahead_us, size.plain_us = [], []

    def _of(self, num_sequences: int) -> _Size:
        return self._sizes.setdefault(num_sequences.bit_length(), _Size())
