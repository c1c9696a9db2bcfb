"""The scheduler's data: sequences, events that change them, and the plan of a step. No behaviour.

A sequence's tokens, left to right (the scheduler counts them and never sees their values)::

    0            num_computed        num_prompt_tokens       num_tokens
    |  in the cache   |  to compute          |  sampled so far    | next: sampled from the last
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from aios_compile.runtime.batch import Limits
from aios_compile.runtime.decisions import Decision
from aios_compile.runtime.kv_cache import PagePool


@dataclass(frozen=True)
class Arrive:
    """A request that passed admission. Its sequences get consecutive ids from `sequence_id` on.

    all_rows: the logits of every prompt position are wanted. samples False: no token is sampled,
    the sequence ends when its rows are computed.
    """

    request_id: int
    sequence_id: int
    num_prompt_tokens: int
    num_sequences: int = 1
    all_rows: bool = False
    samples: bool = True


@dataclass(frozen=True)
class Schedule:
    """Plan the next step. No other plan is in flight."""


@dataclass(frozen=True)
class Commit:
    """The planned step ran. `finished` are (sequence id, reason); the others got their tokens."""

    finished: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Abort:
    """Drop a request, wherever it is. Never while a step is in flight."""

    request_id: int


@dataclass(frozen=True)
class Preempt:
    """Take a sequence's pages away now, as a shortage would. Nobody sees it in the output."""

    sequence_id: int


Event = Arrive | Schedule | Commit | Abort | Preempt


@dataclass(slots=True)
class SequenceState:
    """One sequence as the scheduler sees it. Owner of every field: the scheduler."""

    sequence_id: int  # also the order of arrival
    request_id: int
    num_prompt_tokens: int
    num_tokens: int
    all_rows: bool
    samples: bool
    forks_from: int | None  # waits until this sequence has computed the shared prompt
    num_computed: int = 0
    num_rows_done: int = 0  # prompt rows already delivered: a recompute does not repeat them
    pages: list[int] = field(default_factory=list)
    page_epoch: int = 0  # changes when an entry of `pages` changes, not when one is appended
    running: bool = False

    @property
    def num_prompt_rows(self) -> int:
        """Prompt positions whose own row is wanted; the last one is the sampled row if any."""
        return (self.num_prompt_tokens - self.samples) if self.all_rows else 0

    def num_rows(self, start: int, end: int) -> int:
        """Return the logit rows that computing [start, end) needs."""
        rows = min(end, self.num_prompt_rows) - max(start, self.num_rows_done)
        return max(0, rows) + (1 if self.samples and end == self.num_tokens else 0)


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of a sequence, and how many logit rows they need."""

    sequence_id: int
    start: int
    num_tokens: int
    num_rows: int


@dataclass(slots=True)
class Plan:
    """What one step does: page copies first, in order, then one flat batch of the chunks."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    num_tokens: int = 0
    num_rows: int = 0


@dataclass
class SchedulerState:
    """All that the scheduler knows. Plain data: it can be copied, compared and printed."""

    limits: Limits
    pool: PagePool
    sequences: dict[int, SequenceState] = field(default_factory=dict)
    running: list[SequenceState] = field(default_factory=list)  # sorted by sequence id
    waiting: list[SequenceState] = field(default_factory=list)  # sorted by sequence id
    siblings: dict[int, list[int]] = field(default_factory=dict)  # leader -> who forks from it
    in_flight: Plan | None = None
    step: int = 0
    last_wait: tuple[int, str] | None = None  # a waiting head is logged once a reason

    @classmethod
    def empty(cls, limits: Limits) -> SchedulerState:
        return cls(limits, PagePool(limits.num_pages))

    def copy(self) -> SchedulerState:
        """Return an independent state. A plan in flight is shared: nobody changes it any more."""
        sequences = {i: replace(s, pages=list(s.pages)) for i, s in self.sequences.items()}
        return replace(
            self,
            pool=self.pool.copy(),
            sequences=sequences,
            running=[sequences[s.sequence_id] for s in self.running],
            waiting=[sequences[s.sequence_id] for s in self.waiting],
            siblings={leader: list(ids) for leader, ids in self.siblings.items()},
        )

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def check_integrity(self) -> None:
        """Assert the laws of the pool and of the queues."""
        self.pool.check_integrity(s.pages for s in self.sequences.values())
        for queue, running in ((self.running, True), (self.waiting, False)):
            ids = [s.sequence_id for s in queue]
            assert ids == sorted(set(ids)), f"a queue is out of order: {ids}"
            assert all(s.running is running for s in queue)
        assert len(self.running) + len(self.waiting) == len(self.sequences)
        for s in self.sequences.values():
            assert 0 <= s.num_computed <= s.num_tokens
            assert len(s.pages) * self.limits.page_size >= s.num_computed, "computed without pages"
            assert len(s.pages) <= self.limits.max_pages_per_sequence


_EVENTS: tuple[type[Any], ...] = (Arrive, Schedule, Commit, Abort, Preempt)


def event_record(event: Event, now_us: int) -> dict[str, Any]:
    """Return the event as a JSON-able record; `event_from_record` is the inverse."""
    return {"type": type(event).__name__, "now_us": now_us, **asdict(event)}


def event_from_record(record: dict[str, Any]) -> tuple[Event, int]:
    """Return (event, now_us)."""
    values = {key: value for key, value in record.items() if key not in ("type", "now_us")}
    if "finished" in values:
        values["finished"] = tuple((int(s), str(reason)) for s, reason in values["finished"])
    kinds = {kind.__name__: kind for kind in _EVENTS}
    event: Event = kinds[record["type"]](**values)
    return event, int(record["now_us"])
