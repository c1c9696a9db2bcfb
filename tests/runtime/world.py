"""A scheduler and the small model that watches it: what each page holds, and who may do what.

The model knows nothing of hashes, reference counts or queues. It carries out every plan on a
memory whose slots hold (tenant, all tokens up to the position), and before a chunk runs it reads
the whole prefix back: a page of another tenant, a stale or a half-copied one differs. Free pages
are poisoned. The next token is a function of the prefix, as with a greedy model, so that equal
prompts go on equally and the prefix cache has something to find.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aios_compile.runtime.batch import Limits
from aios_compile.runtime.decisions import Decision
from aios_compile.runtime.events import (
    Abort,
    Arrive,
    Commit,
    Event,
    Expire,
    MemoryPressure,
    Preempt,
    Schedule,
    event_record,
)
from aios_compile.runtime.schedule_state import Chunk, Plan, SchedulerOptions, SchedulerState
from aios_compile.runtime.scheduler import advance

ALPHABET = 3
Slot = tuple[int, int]


@dataclass
class Known:
    """What the model knows of one sequence."""

    request: int
    tenant: str
    prompt: int
    tokens: list[int]
    all_rows: bool
    deadline_us: int | None
    may_wait: bool  # a sibling, or preempted from outside: younger ones may run before it
    rows: int = 0
    values: list[int] = field(default_factory=list)

    def value(self, position: int) -> int:
        """Return what the slot of a position must hold."""
        while len(self.values) <= position:
            before = self.values[-1] if self.values else hash(self.tenant)
            self.values.append(hash((before, self.tokens[len(self.values)])))
        return self.values[position]

    def next_token(self) -> int:
        return self.value(len(self.tokens) - 1) % ALPHABET


class World:
    """A scheduler and the model that watches it."""

    def __init__(self, limits: Limits, options: SchedulerOptions | None = None) -> None:
        self.limits = limits
        self.options = options or SchedulerOptions()
        self.state = SchedulerState.empty(limits, self.options, b"key")
        self.known: dict[int, Known] = {}
        self.memory: dict[Slot, int] = {}
        self.host: dict[Slot, int] = {}
        self.events: list[tuple[Event, int]] = []
        self.decisions: list[Decision] = []
        self.next_id = 0
        self.clock = 0
        self.num_hits = 0
        self.held_back = False

    @property
    def records(self) -> list[dict[str, Any]]:
        """Everything that happened, as a log has it."""
        return [event_record(event, clock) for event, clock in self.events]

    def do(self, event: Event) -> Plan:
        self.clock += 1
        self.events.append((event, self.clock))
        plan = advance(self.state, event, self.clock)
        self.decisions += plan.decisions
        self.state.check_integrity()
        assert set(self.state.sequences) == set(self.known)
        self._move(plan)
        return plan

    def _move(self, plan: Plan) -> None:
        """Carry out the page moves of a plan, in its order, then poison what is free."""
        for page, host_page in plan.swap_outs:
            self._copy(self.memory, page, self.host, host_page)
        for source, target in plan.copies:
            self._copy(self.memory, source, self.memory, target)
        for host_page, page in plan.swap_ins:
            self._copy(self.host, host_page, self.memory, page)
        for page in (0, *self.state.pool.free, *self.state.pool.withheld):
            for offset in range(self.limits.page_size):
                self.memory.pop((page, offset), None)

    def _copy(self, source: dict[Slot, int], a: int, target: dict[Slot, int], b: int) -> None:
        for offset in range(self.limits.page_size):
            if (a, offset) in source:
                target[b, offset] = source[a, offset]
            else:
                target.pop((b, offset), None)

    def arrive(
        self,
        prompt: list[int],
        n: int = 1,
        all_rows: bool = False,
        tenant: str = "",
        priority: int = 0,
        patience_us: int | None = None,
    ) -> None:
        first = self.next_id
        self.next_id += n
        deadline = None if patience_us is None else self.clock + patience_us
        for i in range(n):
            rows = all_rows and i == 0
            self.known[first + i] = Known(
                first, tenant, len(prompt), list(prompt), rows, deadline, i > 0
            )
        self.do(
            Arrive(
                first, first, len(prompt), n, all_rows, tokens=tuple(prompt), tenant=tenant,
                priority=priority, max_tokens=5, deadline_us=deadline,
            )
        )  # fmt: skip

    def abort(self, request: int) -> None:
        self.known = {i: k for i, k in self.known.items() if k.request != request}
        self.do(Abort(request, "disconnect"))

    def expire(self) -> None:
        now = self.clock + 1
        late = {k.request for k in self.known.values() if k.deadline_us and k.deadline_us <= now}
        self.known = {i: k for i, k in self.known.items() if k.request not in late}
        assert set(self.do(Expire()).expired) == late

    def preempt(self, sequence: int, how: str = "auto") -> None:
        self.known[sequence].may_wait = True
        self.do(Preempt(sequence, how))

    def press(self, num_pages: int) -> None:
        self.held_back = True
        for known in self.known.values():
            known.may_wait = True
        self.do(MemoryPressure(num_pages))

    def step(
        self, may_finish: set[int], drafts: int = 0, accepted: int = 0, errors: bool = False
    ) -> None:
        oldest = min(self.known, default=None)
        asked = [s.sequence_id for s in self.state.running] if drafts else []
        plan = self.do(Schedule(tuple((i, drafts) for i in asked)))
        for decision in plan.decisions:
            if decision.reason == "its prefix is being computed":  # it let younger ones go first
                self.known[decision.sequences[0]].may_wait = True
        self.check(plan)
        if oldest is not None and self.options.policy == "fcfs" and not self.known[oldest].may_wait:
            assert oldest in {c.sequence_id for c in plan.chunks}, "the oldest made no progress"
        if not plan.chunks:
            assert not self.known, "work, but nothing is planned"
            return
        finished, sampled = [], []
        for chunk in plan.chunks:
            number = chunk.sequence_id
            tokens, reason = self._run(chunk, accepted, number in may_finish, errors)
            sampled.append(tokens)
            if reason is not None:
                finished.append((number, reason))
                del self.known[number]
        self.do(Commit(tuple(finished), tuple(sampled)))

    def _run(
        self, chunk: Chunk, accepted: int, may_finish: bool, errors: bool
    ) -> tuple[tuple[int, ...], str | None]:
        """Write a chunk's slots; return its tokens and why its sequence ends, if it does."""
        number = chunk.sequence_id
        known, pages = self.known[number], self.state.sequences[number].pages
        end = chunk.start + chunk.num_tokens - chunk.num_drafts
        samples = end == len(known.tokens)
        ends_badly = samples and may_finish and errors
        tokens: list[int] = []
        if samples and not ends_badly:
            for _ in range(1 + min(accepted, chunk.num_drafts)):
                tokens.append(known.next_token())
                known.tokens.append(tokens[-1])
        size = self.limits.page_size
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            slot = (pages[position // size], position % size)
            true = position < end or position < end + len(tokens) - 1
            self.memory[slot] = known.value(position) if true else -1
            if ends_badly:
                self.memory[slot] = -2  # what a NaN has touched
        if not samples:
            return (), None
        full = len(known.tokens) >= self.limits.capacity_tokens + 1
        if not (full or may_finish):
            return tuple(tokens), None
        if known.all_rows and not ends_badly:
            assert known.rows == known.prompt - 1, "prompt rows lost or repeated"
        return tuple(tokens), "error" if ends_badly else "stop"

    def check(self, plan: Plan) -> None:
        assert sum(c.num_tokens for c in plan.chunks) == plan.num_tokens
        assert sum(c.num_rows for c in plan.chunks) == plan.num_rows
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        assert plan.num_rows <= self.limits.max_num_logit_rows
        assert len(plan.chunks) <= self.limits.max_num_seqs
        bound = self.options.chunked_prefill_size
        if bound is not None and plan.num_decodes:
            assert plan.num_prefill_tokens <= bound
        written: set[int] = set()
        for chunk in plan.chunks:
            written |= self._check_chunk(chunk, written)
        self.num_hits += len(plan.hits)
        targets = [target for _, target in plan.copies] + [page for _, page in plan.swap_ins]
        assert len(set(targets)) == len(targets)
        alive = {page for s in self.state.sequences.values() for page in s.pages}
        assert set(targets) <= alive, "a copy for nobody"

    def _check_chunk(self, chunk: Chunk, written: set[int]) -> set[int]:
        """Check one chunk's size, rows and pages, and read its prefix; return what it writes."""
        state, known = self.state.sequences[chunk.sequence_id], self.known[chunk.sequence_id]
        size, last = self.limits.page_size, chunk.start + chunk.num_tokens
        end = last - chunk.num_drafts
        assert end - chunk.start > 0 and chunk.start == state.num_computed
        assert end <= len(known.tokens) == state.num_tokens
        pages = state.pages[chunk.start // size : (last - 1) // size + 1]
        assert len(pages) == (last - 1) // size + 1 - chunk.start // size
        assert all(self.state.pool.reference_counts[p] == 1 for p in pages), "writes a shared"
        assert not any(self.state.pool.is_indexed(p) for p in pages), "writes a cached page"
        assert not written & set(pages)
        rows = chunk.num_rows - (end == len(known.tokens)) - chunk.num_drafts
        if known.all_rows:
            known.rows += rows
        else:
            assert rows == 0
        window = self.options.window_tokens
        first = 0 if window is None else max(0, chunk.start - window + 1)
        for position in range(first, chunk.start):
            slot = (state.pages[position // size], position % size)
            assert self.memory.get(slot) == known.value(position), (
                f"sequence {chunk.sequence_id} reads a foreign or stale token at {position}"
            )
        return set(pages)

    def drain(self) -> None:
        """Let everything end, within a bounded number of steps."""
        if self.held_back:
            self.press(0)
        for _ in range(3000):
            if not self.known:
                break
            self.step(set(self.known))
        assert not self.known, "requests starve"
        assert self.state.pool.num_free == self.limits.num_pages - 1
        assert not self.state.tenants and not self.state.siblings
        if self.state.host is not None:
            assert self.state.host.num_free == self.options.num_host_pages
