"""The scheduler's data: its options, sequences, and the plan of a step. No behaviour.

A sequence's tokens, left to right (their values matter to the prefix cache alone)::

    0            num_computed        num_prompt_tokens       num_tokens
    |  in the cache   |  to compute          |  sampled so far    | next: sampled from the last
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

from aios_compile.runtime.batch import TRASH_PAGE, Limits
from aios_compile.runtime.decisions import Decision
from aios_compile.runtime.kv_cache import PagePool
from aios_compile.runtime.prefix_cache import PrefixCache


@dataclass(frozen=True)
class SchedulerOptions:
    """What the scheduler is told once. Part of the log, so that a replay has the same.

    policy: one of policies.RANKS. chunked_prefill_size: prompt tokens in a step that also continues
    running sequences; None sets no bound but the step's. window_tokens: keys that a query sees at
    most, if that holds for every layer; None keeps all pages. num_host_pages: pages of host memory
    to swap to. starvation_us: who waits longer goes first whatever the policy. quantum_tokens: what
    a tenant gets in a round.
    """

    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    chunked_prefill_size: int | None = None
    window_tokens: int | None = None
    num_host_pages: int = 0
    starvation_us: int = 30_000_000
    quantum_tokens: int = 512


@dataclass(frozen=True)
class Costs:
    """Measured times; zero before anything was measured."""

    token_us: float = 0.0  # to compute a token in a step that runs anyway
    page_copy_us: float = 0.0  # to copy a page to or from host memory


@dataclass(slots=True)
class TenantShare:
    """A tenant that has sequences, and the tokens that it may still compute in this round."""

    num_sequences: int = 0
    deficit_tokens: int = 0


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
    tenant: str = ""
    priority: int = 0  # smaller is more urgent
    max_tokens: int = 0  # most output tokens, 0 when nobody knows
    arrived_us: int = 0
    deadline_us: int | None = None
    promoted: bool = False  # it has waited too long and goes first
    num_charged: int = 0  # tokens that its tenant has paid for
    tokens: list[int] | None = None  # None: the prefix cache is not for this one
    num_computed: int = 0
    num_rows_done: int = 0  # prompt rows already delivered: a recompute does not repeat them
    pages: list[int] = field(default_factory=list)
    page_epoch: int = 0  # changes when an entry of `pages` changes, not when one is appended
    num_dropped: int = 0  # first entries of `pages` that left the window: the trash page
    host_pages: list[int] = field(default_factory=list)  # copies of pages, while it is swapped out
    num_swapped: int = 0  # tokens that they hold
    num_swapped_dropped: int = 0  # pages before them that had left the window
    running: bool = False
    is_finite: bool = False  # a row was sampled, so what is computed may be cached
    digests: list[bytes] = field(default_factory=list)  # of the full pages, as far as needed
    serials: list[int] = field(default_factory=list)  # prefix cache entries of the first pages

    @property
    def num_prompt_rows(self) -> int:
        """Prompt positions whose own row is wanted; the last one is the sampled row if any."""
        return (self.num_prompt_tokens - self.samples) if self.all_rows else 0

    def num_rows(self, start: int, end: int) -> int:
        """Return the logit rows that computing [start, end) needs."""
        rows = 0
        if self.all_rows:
            rows = max(0, min(end, self.num_prompt_rows) - max(start, self.num_rows_done))
        return rows + (1 if self.samples and end == self.num_tokens else 0)


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of a sequence, and how many logit rows they need.

    The last num_drafts of them are guesses that this step verifies, each with a row of its own.
    """

    sequence_id: int
    start: int
    num_tokens: int
    num_rows: int
    num_drafts: int = 0


@dataclass(slots=True)
class Plan:
    """What follows from one event. Pages first, in the order of the fields, then one flat batch."""

    swap_outs: list[tuple[int, int]] = field(default_factory=list)  # (page, host page)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source, target), in order
    swap_ins: list[tuple[int, int]] = field(default_factory=list)  # (host page, page)
    withheld: list[int] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    expired: list[int] = field(default_factory=list)  # request ids
    admitted: list[int] = field(default_factory=list)
    hits: list[tuple[int, int]] = field(default_factory=list)  # (sequence id, cached tokens)
    decisions: list[Decision] = field(default_factory=list)
    num_tokens: int = 0
    num_rows: int = 0
    num_prefill_tokens: int = 0
    num_decodes: int = 0
    num_evictions: int = 0


@dataclass
class SchedulerState:
    """All that the scheduler knows. Plain data: it can be copied, compared and printed."""

    limits: Limits
    pool: PagePool
    options: SchedulerOptions = SchedulerOptions()
    sequences: dict[int, SequenceState] = field(default_factory=dict)
    host: PagePool | None = None  # pages of host memory; its page 0 is not used either
    costs: Costs = Costs()
    running: list[SequenceState] = field(default_factory=list)  # sorted by sequence id
    waiting: list[SequenceState] = field(default_factory=list)  # sorted by the policy's rank
    siblings: dict[int, list[int]] = field(default_factory=dict)  # leader -> who forks from it
    in_flight: Plan | None = None
    step: int = 0
    last_wait: tuple[int, str] | None = None  # a waiting head is logged once a reason
    tenants: dict[str, TenantShare] = field(default_factory=dict)  # those with sequences, in turn
    last_tenant: str = ""
    NEVER_US: ClassVar[int] = 1 << 62
    next_promotion_us: int = NEVER_US

    @classmethod
    def empty(
        cls, limits: Limits, options: SchedulerOptions | None = None, cache_key: bytes = b""
    ) -> SchedulerState:
        """Return the first state. cache_key: the secret of the prefix cache's hashes."""
        options = options or SchedulerOptions()
        cache = PrefixCache(cache_key, limits.page_size) if options.enable_prefix_caching else None
        host = PagePool(options.num_host_pages + 1) if options.num_host_pages else None
        return cls(limits, PagePool(limits.num_pages, cache), options, host=host)

    def copy(self) -> SchedulerState:
        """Return an independent state. A plan in flight is shared: nobody changes it any more."""
        sequences = {i: _copy(s) for i, s in self.sequences.items()}
        return replace(
            self,
            pool=self.pool.copy(),
            host=None if self.host is None else self.host.copy(),
            tenants={name: replace(share) for name, share in self.tenants.items()},
            sequences=sequences,
            running=[sequences[s.sequence_id] for s in self.running],
            waiting=[sequences[s.sequence_id] for s in self.waiting],
            siblings={leader: list(ids) for leader, ids in self.siblings.items()},
        )

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def in_flight_ids(self) -> list[int]:
        """Return the sequence ids of the chunks in flight."""
        return [] if self.in_flight is None else [c.sequence_id for c in self.in_flight.chunks]

    def check_integrity(self) -> None:
        """Assert the laws of the pool and of the queues."""
        self.pool.check_integrity(s.pages for s in self.sequences.values())
        if self.host is not None:
            self.host.check_integrity(s.host_pages for s in self.sequences.values())
        ids = [s.sequence_id for s in self.running]
        assert ids == sorted(set(ids)), f"the running are out of order: {ids}"
        assert all(s.running for s in self.running) and not any(s.running for s in self.waiting)
        assert len(self.running) + len(self.waiting) == len(self.sequences)
        counts = Counter(s.tenant for s in self.sequences.values())
        assert counts == {t: share.num_sequences for t, share in self.tenants.items()}
        for s in self.sequences.values():
            assert not (s.host_pages and s.pages), "swapped out and in at once"
            assert bool(s.host_pages) == bool(s.num_swapped)
            assert 0 <= s.num_computed <= s.num_tokens
            assert len(s.pages) * self.limits.page_size >= s.num_computed, "computed without pages"
            assert len(s.pages) <= self.limits.max_pages_per_sequence
            assert s.tokens is None or len(s.tokens) == s.num_tokens
            assert all(page == TRASH_PAGE for page in s.pages[: s.num_dropped])
            assert TRASH_PAGE not in s.pages[s.num_dropped :], "a page inside the window is gone"


def _copy(sequence: SequenceState) -> SequenceState:
    return replace(
        sequence,
        pages=list(sequence.pages),
        host_pages=list(sequence.host_pages),
        digests=list(sequence.digests),
        serials=list(sequence.serials),
        tokens=None if sequence.tokens is None else list(sequence.tokens),
    )
