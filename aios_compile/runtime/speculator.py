"""Speculative decoding: who proposes drafts, how many, and how well they did.

The target computes a sequence's last token and its drafts in one step, one sampled row each. Each
row is sampled as a decode would be: with the seed of its position, and with the drafts before it as
history. A draft is accepted if it is the token that was sampled before it, so the tokens are those
of a run without speculation, at every temperature::

    computed    t    d1   d2   d3
    sampled     d1   d2   x    -        accepted: d1, d2; x is the next token; d3 was in vain

(Leviathan et al. 2023 accept by ratio and keep the distribution; with fixed noise a position the
tokens themselves are kept.)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from aios_compile.runtime.batch import Limits
from aios_compile.runtime.draft_governor import DraftGovernor
from aios_compile.runtime.request import Sequence

MAX_PAUSE = 32  # steps without drafts after repeated failure


class Proposer(Protocol):
    """Guesses tokens. Used from the engine's thread alone."""

    def propose(self, wanted: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        """Return for each (sequence, most) at most that many drafts, possibly none."""
        ...

    def forget(self, sequence_id: int) -> None:
        """Drop what is kept for a sequence that ended."""
        ...


@dataclass
class DraftLength:
    """How many drafts one sequence is worth: grows by success, shrinks by failure, pauses.

    All accepted: twice as many, up to `most`. Some: one more than were accepted. None: half; and at
    one draft a pause that doubles, because even one costs time when it never comes true.
    """

    most: int
    length: int
    pause: int = 0
    next_pause: int = 1

    def next(self) -> int:
        if self.pause:
            self.pause -= 1
            return 0
        return self.length

    def update(self, proposed: int, accepted: int) -> None:
        if accepted:
            self.next_pause = 1
            whole = accepted == proposed
            self.length = min(self.most, max(self.length, 2 * proposed) if whole else accepted + 1)
        elif self.length > 1:
            self.length //= 2
        else:
            self.pause, self.next_pause = self.next_pause, min(MAX_PAUSE, 2 * self.next_pause)


@dataclass
class SpeculationStats:
    """Counters since the start. num_drafts: verifications; each has one or more draft tokens.

    draft_us: time spent on making drafts.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    draft_us: float = 0.0
    failure: str = ""  # why no more drafts are proposed
    governor: DraftGovernor | None = None

    @property
    def acceptance_rate(self) -> float:
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a verifying step yields for one sequence: accepted drafts and one more."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)

    def __str__(self) -> str:
        text = (
            f"{self.num_accepted_tokens} of {self.num_draft_tokens} drafts accepted "
            f"({self.acceptance_rate:.0%}), {self.mean_accepted_length:.2f} tokens a verification, "
            f"{self.draft_us / max(1, self.num_draft_tokens):.0f} us to make a draft"
        )
        text += "" if self.governor is None else f"; {self.governor}"
        return f"{text}; stopped: {self.failure}" if self.failure else text


class Speculator:
    """Owner of the proposer and of each sequence's draft length."""

    def __init__(
        self,
        proposer: Proposer,
        num_speculative_tokens: int,
        limits: Limits,
        governor: DraftGovernor | None = None,
    ) -> None:
        self.stats = SpeculationStats(governor=governor)
        self.governor = governor
        self._proposer = proposer
        self._most = num_speculative_tokens
        self._limits = limits
        self._lengths: dict[int, DraftLength] = {}
        self._drafts: dict[int, list[int]] = {}  # of the step that is planned

    def propose(self, sequences: Iterable[Sequence]) -> dict[int, list[int]]:
        """Return drafts by sequence id, for those that have any, the most promising first.

        An error of the proposer ends speculation, and nothing else: `stats.failure` tells.
        """
        if self.stats.failure:
            return {}
        sequences = list(sequences)
        self._drafts, most = {}, self._most
        if self.governor is not None and sequences:
            most = self.governor.choose(len(sequences))
        if not most:
            return {}
        wanted: list[tuple[Sequence, int]] = []
        for sequence in sequences:
            length = self._length_of(sequence).next()
            if self.governor is not None and self.governor.is_trying:
                length = most
            count = min(length, self._useful(sequence), most)
            if count > 0:
                wanted.append((sequence, count))
        wanted.sort(key=lambda pair: -pair[1])
        begin = time.perf_counter()
        try:
            proposed = self._proposer.propose(wanted) if wanted else []
        except Exception as error:  # noqa: BLE001 - drafts are a help, no request depends on them
            self.stats.failure = f"{type(error).__name__}: {error}"
            print(f"aios: speculation stopped: {self.stats.failure}", file=sys.stderr)
            return {}
        self.stats.draft_us += (time.perf_counter() - begin) * 1e6
        vocab = self._limits.vocab_size
        for (sequence, count), tokens in zip(wanted, proposed):
            good = next((i for i, t in enumerate(tokens) if not 0 <= t < vocab), len(tokens))
            if good:
                self._drafts[sequence.sequence_id] = tokens[: min(good, count)]
        return self._drafts

    def observe(self, sequence_id: int, proposed: int, accepted: int) -> None:
        """Take in the result of one verification."""
        self.stats.num_drafts += 1
        self.stats.num_draft_tokens += proposed
        self.stats.num_accepted_tokens += accepted
        if self.governor is not None:
            self.governor.acceptance.saw(proposed, accepted)
        if sequence_id in self._lengths:
            self._lengths[sequence_id].update(proposed, accepted)

    def measure(self, num_computed: int, micros: float) -> None:
        """Take in the time of a step of decodes, with all that drafts cost."""
        if self.governor is not None:
            longest = max(map(len, self._drafts.values()), default=0)
            self.governor.measure(num_computed, len(self._drafts), longest, micros)

    def forget(self, sequence_id: int) -> None:
        """Drop what is kept for a sequence that ended. Idempotent."""
        self._lengths.pop(sequence_id, None)
        self._proposer.forget(sequence_id)

    def _length_of(self, sequence: Sequence) -> DraftLength:
        length = self._lengths.get(sequence.sequence_id)
        if length is None:
            length = DraftLength(self._most, self._most)
            self._lengths[sequence.sequence_id] = length
        return length

    def _useful(self, sequence: Sequence) -> int:
        """Return how many drafts can still become output: the last token is sampled from one."""
        left = sequence.admitted.max_tokens - sequence.num_output_tokens
        return min(left, self._limits.max_model_len - len(sequence.tokens)) - 1
