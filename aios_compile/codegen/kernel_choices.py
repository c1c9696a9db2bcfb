"""Which candidate of each kernel a step runs, by its number of tokens; and what was measured.

Data only, torch-free: the ledger is kept with the artefact (kernel_choices.json) and shown by the
report. runtime/select_kernels.py fills it. Buckets are half open: a step of T tokens falls into the
first whose largest number of tokens is at least T, and what is larger than all into one more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from aios_compile.codegen.program import Program

FILE = "kernel_choices.json"
STANDARD = "standard"


@dataclass(frozen=True)
class Trial:
    """One candidate of one kernel in steps of `tokens` tokens, timed within the whole step.

    standard_us: the phases of what it is held against in one step, all layers, medians over the
    rounds; on a GPU, whose kernels overlap, the whole step. speedup: the median of that / candidate
    over pairs, and its quartiles.
    """

    kernel: str
    tokens: int
    candidate: str
    standard_us: float
    speedup: float
    quartiles: tuple[float, float]
    chosen: bool

    def __str__(self) -> str:
        low, high = self.quartiles
        return (
            f"{self.kernel}, {self.tokens} tokens: {self.candidate} {self.speedup:.3f}x of "
            f"{self.standard_us:.0f} us ({low:.3f}-{high:.3f}){', chosen' * self.chosen}"
        )


@dataclass(frozen=True)
class KernelChoices:
    """buckets: the largest T of each but the last. chosen: kernel -> a candidate's name a bucket.

    trials: the ledger. notes: what was not measured, and why. huge_pages: the weights lay in them,
    which changes what is best: the choices hold where that is so again.
    """

    buckets: tuple[int, ...] = ()
    chosen: Mapping[str, tuple[str, ...]] | None = None
    trials: tuple[Trial, ...] = ()
    notes: tuple[str, ...] = ()
    huge_pages: bool = False

    def table(self, program: Program) -> NDArray[np.uint8]:
        """Return the candidates' numbers [bucket, kernel]; 0 is the standard one.

        Raises KeyError for a candidate that a kernel does not have.
        """
        table = np.zeros((len(self.buckets) + 1, max(1, len(program.kernels))), np.uint8)
        for k, kernel in enumerate(program.kernels):
            numbers = {STANDARD: 0, **{c.name: i + 1 for i, c in enumerate(kernel.candidates)}}
            names = (self.chosen or {}).get(kernel.name, ())
            for bucket, name in enumerate(names):
                table[bucket, k] = numbers[name]
        return table

    def name_of(self, kernel: str, tokens: int) -> str:
        """Return the candidate that a kernel runs in steps of so many tokens, or STANDARD."""
        names = (self.chosen or {}).get(kernel, ())
        bucket = bisect_left(self.buckets, tokens)
        return names[bucket] if bucket < len(names) else STANDARD

    def lines(self) -> Iterator[str]:
        """Yield the ledger as lines for people."""
        yield from (f"select_kernels: {note}" for note in self.notes)
        yield from (f"select_kernels: {trial}" for trial in self.trials)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> KernelChoices:
        """Read what to_json wrote."""
        trials = (Trial(**{**t, "quartiles": tuple(t["quartiles"])}) for t in data["trials"])
        chosen = {name: tuple(names) for name, names in (data["chosen"] or {}).items()}
        buckets, notes = tuple(data["buckets"]), tuple(data["notes"])
        return KernelChoices(buckets, chosen, tuple(trials), notes, data["huge_pages"])


NO_CHOICES = KernelChoices()


def everywhere(program: Program, candidate: str) -> KernelChoices:
    """Return the choice of one candidate for every kernel that has it."""
    having = [k.name for k in program.kernels if candidate in {c.name for c in k.candidates}]
    return KernelChoices((), dict.fromkeys(having, (candidate,)))
