"""The engine thread's half: it alone steps, and `step` reads: schedule, run, commit, deliver.

Callers' threads leave commands in an inbox and wait on a request's `Delivery`. A KeyboardInterrupt
reaches the main thread only, so it never lands inside a step.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable

from aios_compile.errors import EngineClosedError, EngineError, QueueFullError, error_code
from aios_compile.runtime.batch import Batch, Executor, StepResult
from aios_compile.runtime.batch_builder import BatchBuilder
from aios_compile.runtime.commit import Committer, end_request
from aios_compile.runtime.decisions import DecisionLog
from aios_compile.runtime.engine_stats import EngineStats, counters, queue_and_pages
from aios_compile.runtime.events import (
    Abort,
    Arrive,
    Commit,
    Event,
    Expire,
    MemoryPressure,
    Schedule,
    event_record,
)
from aios_compile.runtime.health import Pulse, now_us
from aios_compile.runtime.metrics import EngineMetrics, MetricsSnapshot
from aios_compile.runtime.output_text import Tokenizer
from aios_compile.runtime.outputs import StreamChunk
from aios_compile.runtime.page_moves import PageMover, TokenCost
from aios_compile.runtime.replay import header_record
from aios_compile.runtime.request import Request, Sequence
from aios_compile.runtime.schedule_state import Plan, SchedulerOptions, SchedulerState
from aios_compile.runtime.scheduler import advance
from aios_compile.runtime.speculator import SpeculationStats, Speculator


class EngineCore:
    """Owner of the scheduler's state, the builder and the executor; used by one thread only.

    Other threads touch `submit`, `abort` and `request_close` alone.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        seed: int,
        log: DecisionLog,
        options: SchedulerOptions | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.executor = executor
        self.speculator = speculator
        self._drafts: dict[int, list[int]] = {}  # of the step that is planned
        self.state = SchedulerState.empty(executor.limits, options, os.urandom(32))
        self.log = log
        log.header(header_record(executor.limits, self.state.options))
        self._pages = PageMover(executor, self.state.options)
        self._token_cost: TokenCost | None = None  # measured when the thread starts
        self._next_deadline_us = SchedulerState.NEVER_US
        self._held_back: int | None = None  # guarded by _wake
        self.stats = EngineStats()
        self.metrics = EngineMetrics()
        self._probe_metrics = EngineMetrics()  # of the watchdog's own requests; nobody reads them
        self.pulse = Pulse()
        self.requests: dict[int, Request] = {}  # added by submit, removed by the thread
        self.sequences: dict[int, Sequence] = {}
        self.closed = threading.Event()
        self._builder = BatchBuilder(executor.limits)
        self._committer = Committer(executor.limits, tokenizer)
        self._seed = seed
        # reentrant: the garbage collector may drop (abort) a stream anywhere
        self._wake = threading.Condition()
        self._inbox: deque[list[Request]] = deque()  # guarded by _wake
        self._aborted: deque[Request] = deque()  # guarded by _wake
        self._closing = False  # guarded by _wake
        self._close_reason = "the model was closed"
        self._next_request = 0
        self._next_sequence = 0
        self._num_begun = 0  # requests that left the queue: they had their first step, or ended

    # ---- called from callers' threads

    @property
    def num_waiting(self) -> int:
        """Requests that have not had their first step; may be a step old."""
        return max(0, self._next_request - self._num_begun)

    @property
    def is_closing(self) -> bool:
        return self._closing

    def check_queue(self, num_requests: int, max_waiting: int) -> None:
        """Raise QueueFullError if so many more requests would not fit the queue."""
        waiting = self.num_waiting
        if waiting + num_requests > max_waiting:
            raise QueueFullError(
                f"{waiting} requests wait, expected at most {max_waiting - num_requests}",
                retry_after_s=self.metrics.retry_after_s(waiting, now_us()),
            )

    def submit(self, requests: list[Request], max_waiting: int | None = None) -> None:
        """Queue admitted requests, all or none.

        Raises EngineClosedError after the end, QueueFullError beyond `max_waiting` in the queue.
        """
        with self._wake:
            if self._closing:
                raise EngineClosedError(self._close_reason, advice="load the model again")
            if max_waiting is not None:
                self.check_queue(len(requests), max_waiting)
            at_us = now_us()
            for request in requests:
                request.number(self._next_request, self._next_sequence, self._seed, at_us)
                self._next_request += 1
                self._next_sequence += len(request.sequences)
                self.requests[request.request_id] = request
            self._inbox.append(requests)
            self._wake.notify()

    def abort(self, requests: list[Request]) -> None:
        """End requests with "abort"; those that have ended already stay as they are."""
        with self._wake:
            self._aborted.extend(requests)
            self._wake.notify()

    def hold_back(self, num_pages: int) -> None:
        """Let the scheduler do without so many pages from the next step on."""
        with self._wake:
            self._held_back = num_pages
            self._wake.notify()

    def request_close(self) -> None:
        """Let the thread end everything after the step that runs; returns at once."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    # ---- the engine thread

    def run(self) -> None:
        """Serve until closed. Whatever happens, every caller gets an answer."""
        failure: Exception | None = None
        try:
            self._token_cost = TokenCost(self._pages.measure_page_copy_us())
            while self._take_commands():
                self._expire()
                if self.state.has_work:
                    self.step()
        except Exception as error:  # noqa: BLE001 - callers must not wait for a dead thread
            failure = error
        finally:
            self._shut_down(failure)

    def step(self) -> None:
        """Do one step of the batch."""
        start = time.perf_counter()
        self.pulse.begin()
        plan = self._schedule()
        batch = self._builder.build(plan, self.sequences, self.state.sequences, self._drafts)
        result = self._execute(plan, batch)
        if result is not None:
            self._commit(plan, batch, result)
        self.pulse.end(passed=result is not None)
        step_us = (time.perf_counter() - start) * 1e6
        self.stats.step_us += step_us
        if self._token_cost is not None and (event := self._token_cost.observe(plan, step_us)):
            self._advance(event)
        if self.speculator is not None and not plan.num_prefill_tokens:
            self.speculator.measure(plan.num_tokens, step_us)

    def _schedule(self) -> Plan:
        if self.speculator is not None:
            self._drafts = self.speculator.propose(self._decoding())
        lengths = tuple((number, len(tokens)) for number, tokens in self._drafts.items())
        plan = self._advance(Schedule(lengths))
        if not plan.chunks:
            raise EngineError("the scheduler has work but planned nothing")
        for sequence_id in plan.admitted:
            self._begin(self.requests[self.state.sequences[sequence_id].request_id])
        self.stats.num_steps += 1
        self.stats.num_tokens += plan.num_tokens
        return plan

    def _decoding(self) -> Iterable[Sequence]:
        """Return those that need one token computed to sample the next one."""
        for state in self.state.running:
            if state.samples and state.num_tokens - state.num_computed == 1:
                yield self.sequences[state.sequence_id]

    def _execute(self, plan: Plan, batch: Batch) -> StepResult | None:
        """Run the batch; if the executor raises, its requests end with EngineError."""
        start = time.perf_counter()
        try:
            self._pages.move(plan)
            return self.executor.step(batch)
        except Exception as error:  # noqa: BLE001 - one bad step must not take the engine down
            self._fail_batch(plan, error)
            return None
        finally:
            self.stats.executor_us += (time.perf_counter() - start) * 1e6

    def _commit(self, plan: Plan, batch: Batch, result: StepResult) -> None:
        states = self.state.sequences
        outcome = self._committer.apply(
            plan, batch, result, self.sequences, self.requests, states, self._drafts
        )
        if self._drafts and self.speculator is not None:
            for chunk, tokens in zip(plan.chunks, outcome.sampled):
                if chunk.num_drafts:
                    accepted = max(0, len(tokens) - 1)
                    self.speculator.observe(chunk.sequence_id, chunk.num_drafts, accepted)
        self._advance(Commit(tuple(outcome.finished), tuple(outcome.sampled)))
        at_us = now_us()
        gaps: Counter[int] = Counter()
        for request in outcome.touched:
            if request.first_token_us is None:
                request.first_token_us = at_us
                if not request.admitted.wants_logits:
                    first_us = at_us - request.submitted_us
                    self._metrics_of(request).ttft_s.observe(first_us / 1e6)
            else:
                gaps[request.last_token_us] += 1
            request.last_token_us = at_us
            self._deliver(request)
        self.metrics.num_output_tokens = self._committer.num_sampled
        for last_us, times in gaps.items():  # most have the same one: of the step before
            self.metrics.inter_token_s.observe((at_us - last_us) / 1e6, times)

    def _fail_batch(self, plan: Plan, error: Exception) -> None:
        ids = {self.state.sequences[chunk.sequence_id].request_id for chunk in plan.chunks}
        ended: list[tuple[int, str]] = []
        for request_id in sorted(ids):
            ended += end_request(self.requests[request_id], "error")
        self._advance(Commit(tuple(ended), ((),) * len(plan.chunks)))
        message = f"a step failed in the executor: {type(error).__name__}: {error}"
        for request_id in sorted(ids):
            failure = EngineError(message)
            failure.__cause__ = error
            self._finish(self.requests[request_id], failure)
        if not getattr(self.executor, "usable", False):
            with self._wake:
                self._closing = True
                self._close_reason = message

    def _take_commands(self) -> bool:
        """Apply what callers left; sleep when there is nothing to do. False: close."""
        if self.state.has_work and not self._has_commands:
            return True  # the hot path takes no lock
        with self._wake:
            while not (self._has_commands or self.state.has_work):
                self._wake.wait()
            arrived, self._inbox = self._inbox, deque()
            aborted, self._aborted = self._aborted, deque()
            closing = self._closing
            held_back, self._held_back = self._held_back, None
        for requests in arrived:
            for request in requests:
                self._arrive(request)
        for request in aborted:
            self._abort(request)
        if held_back is not None:
            self._advance(MemoryPressure(held_back))
        return not closing

    def _expire(self) -> None:
        """End the requests whose deadline has passed."""
        if now_us() < self._next_deadline_us:
            return
        for request_id in self._advance(Expire()).expired:
            request = self.requests[request_id]
            end_request(request, "abort", "timeout")
            self._finish(request, None)
        left = (s.deadline_us for s in self.state.sequences.values() if s.deadline_us is not None)
        self._next_deadline_us = min(left, default=SchedulerState.NEVER_US)

    @property
    def _has_commands(self) -> bool:
        held_back = self._held_back is not None
        return bool(self._inbox or self._aborted) or self._closing or held_back

    def _arrive(self, request: Request) -> None:
        admitted = request.admitted
        for sequence in request.sequences:
            self.sequences[sequence.sequence_id] = sequence
        self.stats.num_requests += 1
        self._metrics_of(request).num_prompt_tokens += len(admitted.prompt_token_ids)
        self._advance(
            Arrive(
                request_id=request.request_id,
                sequence_id=request.sequences[0].sequence_id,
                num_prompt_tokens=len(admitted.prompt_token_ids),
                num_sequences=len(request.sequences),
                all_rows=admitted.all_rows,
                samples=not admitted.wants_logits,
                tokens=tuple(request.sequences[0].tokens),
                num_output_tokens=request.sequences[0].num_output_tokens,
                tenant=admitted.params.tenant,
                priority=admitted.params.priority,
                max_tokens=admitted.max_tokens,
                deadline_us=request.deadline_us,
            )
        )
        self.stats.num_prompt_tokens += len(admitted.prompt_token_ids)
        if request.deadline_us is not None:
            self._next_deadline_us = min(self._next_deadline_us, request.deadline_us)

    def _abort(self, request: Request) -> None:
        if self.requests.get(request.request_id) is request:
            end_request(request, "abort")
            self._advance(Abort(request.request_id, "disconnect" if request.is_gone else "abort"))
            self._finish(request, None)

    def _deliver(self, request: Request) -> None:
        if not request.num_unfinished:
            self._finish(request, None)
        elif request.streams:
            request.delivery.put(request.next_chunk())

    def _finish(self, request: Request, error: Exception | None) -> None:
        del self.requests[request.request_id]
        for sequence in request.sequences:
            del self.sequences[sequence.sequence_id]
            if self.speculator is not None:
                self.speculator.forget(sequence.sequence_id)
        self._num_begun += request.started_us is None  # it leaves the queue without a step
        request.finished_us = now_us()
        self._count_end(request, error)
        request.delivery.finish(request.next_chunk(), error)

    def _begin(self, request: Request) -> None:
        """Note the first step of a request; a recompute after a preemption is none."""
        if request.started_us is None:
            request.started_us = now_us()
            self._num_begun += 1
            waited_us = request.started_us - request.submitted_us
            self._metrics_of(request).queue_s.observe(waited_us / 1e6)

    def _metrics_of(self, request: Request) -> EngineMetrics:
        return self._probe_metrics if request.is_probe else self.metrics

    def _count_end(self, request: Request, error: Exception | None) -> None:
        metrics = self._metrics_of(request)
        reason = request.sequences[0].finish_reason or "error"
        if error is not None or reason == "error":
            metrics.errors["not_finite" if error is None else error_code(error)] += 1
        metrics.on_end(request.finished_us, request.finished_us - request.submitted_us, reason)

    def snapshot(self) -> MetricsSnapshot:
        """Return all metrics; while running they may be a step old."""
        running = max(0, len(self.requests) - self.num_waiting)
        drafts = SpeculationStats() if self.speculator is None else self.speculator.stats
        gauges = queue_and_pages(running, self.num_waiting, self.state.pool)
        families = (*gauges, *counters(self.stats, drafts), *self.metrics.families())
        return MetricsSnapshot(families)

    def _advance(self, event: Event) -> Plan:
        at_us = now_us()
        if self.log.records_events:
            self.log.event(event_record(event, at_us), self.state.in_flight_ids)
        plan = advance(self.state, event, at_us)
        self.log.extend(plan.decisions)
        if plan.swap_outs and not isinstance(event, Schedule):
            self._pages.move(plan)
        for sequence_id in plan.preempted:
            self.sequences[sequence_id].num_preemptions += 1
            self.stats.num_preemptions += 1
        for sequence_id, num_cached in plan.hits:
            sequence = self.sequences[sequence_id]
            if not sequence.num_preemptions:  # what a recompute finds is no saving of the request
                sequence.num_cached_tokens = num_cached
            self.stats.num_cached_tokens += num_cached
        self.stats.num_evictions += plan.num_evictions
        return plan

    def _shut_down(self, failure: Exception | None) -> None:
        """Answer everybody, then free the executor. The last thing that the thread does."""
        with self._wake:
            self._closing = True
            if failure is not None:
                self._close_reason = f"the engine failed: {type(failure).__name__}: {failure}"
            self._inbox.clear()
        for request in self.requests.values():
            end_request(request, "abort")
            error = EngineClosedError(self._close_reason, advice="load the model again")
            error.__cause__ = failure
            request.delivery.finish(StreamChunk(""), error)
        self.requests.clear()
        self.sequences.clear()
        self.log.close()
        try:
            self.executor.close()
        finally:
            self.closed.set()
