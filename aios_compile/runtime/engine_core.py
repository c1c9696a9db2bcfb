"""The engine thread's half: it alone steps, and `step` reads: schedule, run, commit, deliver.

Callers' threads leave commands in the inbox and wait on a request's `Delivery`. A KeyboardInterrupt
reaches the main thread only, so it never lands inside a step.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable

from aios_compile.errors import EngineClosedError, EngineError
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
    Preempt,
    Schedule,
    event_record,
)
from aios_compile.runtime.health import Pulse, now_us
from aios_compile.runtime.inbox import Inbox
from aios_compile.runtime.look_ahead import LookAhead, Running
from aios_compile.runtime.metrics import MetricsSnapshot
from aios_compile.runtime.output_text import Tokenizer
from aios_compile.runtime.page_moves import PageMover, TokenCost
from aios_compile.runtime.replay import header_record
from aios_compile.runtime.request import Request, Sequence
from aios_compile.runtime.request_meter import RequestMeter
from aios_compile.runtime.schedule_state import Plan, SchedulerOptions, SchedulerState
from aios_compile.runtime.scheduler import advance
from aios_compile.runtime.speculator import SpeculationStats, Speculator


class EngineCore:
    """Owner of the scheduler's state, the builder and the executor; used by one thread only.

    Other threads touch `inbox` alone, and read what counts.
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
        self.stats = EngineStats()
        self._meter = RequestMeter()
        self.metrics = self._meter.metrics
        self.pulse = Pulse()
        self.inbox = Inbox(seed, self._meter.retry_after_s)
        self.requests = self.inbox.requests
        self.sequences: dict[int, Sequence] = {}
        self.closed = threading.Event()
        self._builder = BatchBuilder(executor.limits)
        self._last_end: float | None = None  # of the step before, unless the engine slept since
        self._ahead = LookAhead(executor, self._builder, self.inbox.hold, self.stats)
        self._committer = Committer(executor.limits, tokenizer)

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
        """Do one step of the batch, and begin the next one if it is known."""
        start = time.perf_counter()
        self.pulse.begin()
        plan = self._schedule()
        running = self._ahead.take(plan, self.state.sequences)
        if running is None:
            batch = self._builder.build(plan, self.sequences, self.state.sequences, self._drafts)
        else:
            batch = running.batch
        result = self._execute(plan, batch, running)
        if result is not None:
            self._commit(plan, batch, result)
        self.pulse.end(passed=result is not None)
        end = time.perf_counter()
        step_us = (end - start) * 1e6
        if self._last_end is not None and (running is not None or not self._ahead.is_begun):
            self._ahead.measure(plan, running is not None, (end - self._last_end) * 1e6)
        self._last_end = end
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
            if self._meter.began(self.requests[self.state.sequences[sequence_id].request_id]):
                self.inbox.left_queue()
        self.stats.num_steps += 1
        self.stats.num_tokens += plan.num_tokens
        return plan

    def _decoding(self) -> Iterable[Sequence]:
        """Return those that need one token computed to sample the next one."""
        for state in self.state.running:
            if state.samples and state.num_tokens - state.num_computed == 1:
                yield self.sequences[state.sequence_id]

    def _execute(self, plan: Plan, batch: Batch, running: Running | None) -> StepResult | None:
        """Run the batch; if the executor raises, its requests end with EngineError.

        running: its step, if it was begun ahead.
        """
        start = time.perf_counter()
        try:
            if running is None:
                self._pages.move(plan)
            if self._foresees(plan):
                running = running or self._ahead.begin(batch)
                self._ahead.begin_guess(self.sequences)
            if running is None:
                result = self.executor.step(batch)
                self.stats.executor_us += (time.perf_counter() - start) * 1e6
                return result
            return self._result_of(running)
        except Exception as error:  # noqa: BLE001 - one bad step must not take the engine down
            self._ahead.abandon(running)
            self._fail_batch(plan, error)
            return None

    def _result_of(self, running: Running) -> StepResult:
        result = running.step.wait()
        assert result is not None, "a step was left out that nothing held back"
        self.stats.executor_us += running.step.micros
        return result

    def _foresees(self, plan: Plan) -> bool:
        """Return whether what follows a plan is known, and guess it."""
        if not self._ahead.is_on or self.speculator is not None or self.inbox.has_news:
            return False
        if self._next_deadline_us != SchedulerState.NEVER_US and now_us() >= self._next_deadline_us:
            return False
        most = self.executor.limits.max_model_len
        return self._ahead.guess(plan, self.state, self.sequences, most)

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
        self._meter.stepped(outcome.touched, self._committer.num_sampled)
        for request in outcome.touched:
            self._deliver(request)

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
            self.inbox.request_close(message)

    def _take_commands(self) -> bool:
        """Apply what callers left; sleep when there is nothing to do. False: close."""
        has_work = self.state.has_work
        if not has_work:
            self._ahead.drop()
            self._last_end = None
        elif not self.inbox.has_news or self._ahead.must_go_on():
            return True  # the hot path takes no lock
        commands = self.inbox.take(may_wait=not has_work)
        for request in commands.arrived:
            self._arrive(request)
        for request in commands.aborted:
            self._abort(request)
        if commands.held_back is not None:
            self._advance(MemoryPressure(commands.held_back))
        return not commands.closing

    def _expire(self) -> None:
        """End the requests whose deadline has passed."""
        if now_us() < self._next_deadline_us or self._ahead.must_go_on():
            return
        for request_id in self._advance(Expire()).expired:
            request = self.requests[request_id]
            end_request(request, "abort", "timeout")
            self._finish(request, None)
        left = (s.deadline_us for s in self.state.sequences.values() if s.deadline_us is not None)
        self._next_deadline_us = min(left, default=SchedulerState.NEVER_US)

    def _arrive(self, request: Request) -> None:
        admitted = request.admitted
        for sequence in request.sequences:
            self.sequences[sequence.sequence_id] = sequence
        self.stats.num_requests += 1
        self._meter.arrived(request)
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
                submitted_us=request.submitted_us,
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
            request.delivery.put(request.next_chunks())

    def _finish(self, request: Request, error: Exception | None) -> None:
        del self.requests[request.request_id]
        for sequence in request.sequences:  # unknown yet if its submission was interrupted
            self.sequences.pop(sequence.sequence_id, None)
            if self.speculator is not None:
                self.speculator.forget(sequence.sequence_id)
        if request.started_us is None:
            self.inbox.left_queue()
        self._meter.ended(request, error)
        request.delivery.finish(request.next_chunks(), error)

    def snapshot(self) -> MetricsSnapshot:
        """Return all metrics; while running they may be a step old."""
        waiting = self.inbox.num_waiting
        running = max(0, len(self.requests) - waiting)
        drafts = SpeculationStats() if self.speculator is None else self.speculator.stats
        gauges = queue_and_pages(running, waiting, self.state.pool)
        families = (*gauges, *counters(self.stats, drafts), *self.metrics.families())
        return MetricsSnapshot(families)

    def _advance(self, event: Event) -> Plan:
        at_us = now_us()
        if self.log.records_events:
            self.log.event(event_record(event, at_us), self.state.in_flight_ids)
        if isinstance(event, (Preempt, MemoryPressure)):
            self._ahead.drop()  # pages move at once
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
        reason = None
        if failure is not None:
            reason = f"the engine failed: {type(failure).__name__}: {failure}"
        reason = self.inbox.shut(reason)
        for request in self.requests.values():
            end_request(request, "abort")
            error = EngineClosedError(reason, advice="load the model again")
            error.__cause__ = failure
            request.delivery.finish(error=error)
        self.requests.clear()
        self.sequences.clear()
        self.log.close()
        try:
            self._ahead.drop()
            self.executor.close()
        finally:
            self.closed.set()
