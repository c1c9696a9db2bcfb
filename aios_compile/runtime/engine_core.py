"""The engine thread's half: it alone steps, and `step` reads: schedule, run, commit, deliver.

Callers' threads leave commands in an inbox and wait on a request's `Delivery`. A KeyboardInterrupt
reaches the main thread only, so it never lands inside a step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from aios_compile.errors import EngineClosedError, EngineError
from aios_compile.runtime.batch import Batch, Executor, StepResult
from aios_compile.runtime.batch_builder import BatchBuilder
from aios_compile.runtime.commit import Committer, end_request
from aios_compile.runtime.decisions import DecisionLog
from aios_compile.runtime.output_text import Tokenizer
from aios_compile.runtime.outputs import StreamChunk
from aios_compile.runtime.request import Request, Sequence
from aios_compile.runtime.schedule_state import (
    Abort,
    Arrive,
    Commit,
    Event,
    Plan,
    Schedule,
    SchedulerState,
    event_record,
)
from aios_compile.runtime.scheduler import advance


@dataclass
class EngineStats:
    """Counters since the engine started. executor_us is the part of step_us inside the executor."""

    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_requests: int = 0
    step_us: float = 0.0
    executor_us: float = 0.0


class EngineCore:
    """Owner of the scheduler's state, the builder and the executor; used by one thread only.

    Other threads touch `submit`, `abort` and `request_close` alone.
    """

    def __init__(
        self, executor: Executor, tokenizer: Tokenizer | None, seed: int, log: DecisionLog
    ) -> None:
        self.executor = executor
        self.state = SchedulerState.empty(executor.limits)
        self.log = log
        self.stats = EngineStats()
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

    # ---- called from callers' threads

    def submit(self, requests: list[Request]) -> None:
        """Queue admitted requests, all or none; raise EngineClosedError after the end."""
        with self._wake:
            if self._closing:
                raise EngineClosedError(self._close_reason, advice="load the model again")
            now_us = _now_us()
            for request in requests:
                request.number(self._next_request, self._next_sequence, self._seed, now_us)
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
            while self._take_commands():
                if self.state.has_work:
                    self.step()
        except Exception as error:  # noqa: BLE001 - callers must not wait for a dead thread
            failure = error
        finally:
            self._shut_down(failure)

    def step(self) -> None:
        """Do one step of the batch."""
        start = time.perf_counter()
        plan = self._schedule()
        batch = self._builder.build(plan, self.sequences, self.state.sequences)
        result = self._execute(plan, batch)
        if result is not None:
            self._commit(plan, batch, result)
        self.stats.step_us += (time.perf_counter() - start) * 1e6

    def _schedule(self) -> Plan:
        plan = self._advance(Schedule())
        if not plan.chunks:
            raise EngineError("the scheduler has work but planned nothing")
        for chunk in plan.chunks:
            if chunk.start == 0:
                request = self.requests[self.state.sequences[chunk.sequence_id].request_id]
                request.started_us = request.started_us or _now_us()
        self.stats.num_steps += 1
        self.stats.num_tokens += plan.num_tokens
        return plan

    def _execute(self, plan: Plan, batch: Batch) -> StepResult | None:
        """Run the batch; if the executor raises, its requests end with EngineError."""
        start = time.perf_counter()
        try:
            if plan.copies:
                self.executor.copy_pages(plan.copies)
            return self.executor.step(batch)
        except Exception as error:  # noqa: BLE001 - one bad step must not take the engine down
            self._fail_batch(plan, error)
            return None
        finally:
            self.stats.executor_us += (time.perf_counter() - start) * 1e6

    def _commit(self, plan: Plan, batch: Batch, result: StepResult) -> None:
        states = self.state.sequences
        ended, touched = self._committer.apply(
            plan, batch, result, self.sequences, self.requests, states
        )
        self._advance(Commit(tuple(ended)))
        now_us = _now_us()
        for request in touched:
            if request.first_token_us is None:
                request.first_token_us = now_us
            self._deliver(request)

    def _fail_batch(self, plan: Plan, error: Exception) -> None:
        ids = {self.state.sequences[chunk.sequence_id].request_id for chunk in plan.chunks}
        ended: list[tuple[int, str]] = []
        for request_id in sorted(ids):
            ended += end_request(self.requests[request_id], "error")
        self._advance(Commit(tuple(ended)))
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
        if self.state.has_work and not (self._inbox or self._aborted or self._closing):
            return True  # the hot path takes no lock
        with self._wake:
            while not (self._inbox or self._aborted or self._closing or self.state.has_work):
                self._wake.wait()
            arrived, self._inbox = self._inbox, deque()
            aborted, self._aborted = self._aborted, deque()
            closing = self._closing
        for requests in arrived:
            for request in requests:
                self._arrive(request)
        for request in aborted:
            self._abort(request)
        return not closing

    def _arrive(self, request: Request) -> None:
        admitted = request.admitted
        for sequence in request.sequences:
            self.sequences[sequence.sequence_id] = sequence
        self.stats.num_requests += 1
        self._advance(
            Arrive(
                request_id=request.request_id,
                sequence_id=request.sequences[0].sequence_id,
                num_prompt_tokens=len(admitted.prompt_token_ids),
                num_sequences=len(request.sequences),
                all_rows=admitted.all_rows,
                samples=not admitted.wants_logits,
            )
        )

    def _abort(self, request: Request) -> None:
        if self.requests.get(request.request_id) is request:
            end_request(request, "abort")
            self._advance(Abort(request.request_id))
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
        request.finished_us = _now_us()
        request.delivery.finish(request.next_chunk(), error)

    def _advance(self, event: Event) -> Plan:
        now_us = _now_us()
        if self.log.records_events:
            self.log.event(event_record(event, now_us))
        plan = advance(self.state, event, now_us)
        self.log.extend(plan.decisions)
        for sequence_id in plan.preempted:
            self.sequences[sequence_id].num_preemptions += 1
            self.stats.num_preemptions += 1
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


def _now_us() -> int:
    return time.perf_counter_ns() // 1000
