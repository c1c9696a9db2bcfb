"""The engine as callers see it: generate, stream, logits, abort, close, from any thread.

caller's thread                       engine thread (engine_core.py)
admit -> Request -> inbox  ------->   schedule -> run -> commit, again and again
wait on Delivery           <-------   text, tokens, the end, or an error
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aios_compile import env
from aios_compile.errors import AiosError, ConfigError, EngineClosedError, RequestError, error_code
from aios_compile.runtime.admission import Admission, Prompt, not_params
from aios_compile.runtime.batch import Executor, Floats
from aios_compile.runtime.decisions import DecisionLog
from aios_compile.runtime.engine_core import EngineCore
from aios_compile.runtime.engine_stats import EngineStats
from aios_compile.runtime.health import Health, judge, now_us
from aios_compile.runtime.metrics import MetricsSnapshot
from aios_compile.runtime.output_text import Tokenizer
from aios_compile.runtime.outputs import CompletionOutput, RequestOutput, StreamChunk
from aios_compile.runtime.request import Progress, Request
from aios_compile.runtime.schedule_state import SchedulerOptions
from aios_compile.runtime.speculator import SpeculationStats, Speculator
from aios_compile.sampling_params import SamplingDefaults, SamplingParams


class Engine:
    """Runs requests on an executor, which it owns from now on.

    seed: requests without a seed get one from this and their number. decision_sink: a file that
    receives every event and decision of the scheduler as JSON lines. why_not: the reason why the
    model can be called for logits only. options: the scheduler's policy and what it may use.
    Safe to use from several threads. After a fork the child gets EngineClosedError: threads and
    locks do not survive a fork.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        defaults: SamplingDefaults | None = None,
        seed: int = 0,
        decision_sink: Path | None = None,
        why_not: str = "",
        options: SchedulerOptions | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        limits, eos = executor.limits, frozenset(eos_token_ids)
        wrong = [token_id for token_id in eos if not 0 <= token_id < limits.vocab_size]
        if wrong:
            raise ConfigError(
                f"eos_token_id {wrong[0]} is out of the vocabulary of {limits.vocab_size}"
            )
        self.tokenizer = tokenizer
        self.defaults = defaults or SamplingDefaults({}, {})
        self.admission = Admission(limits, tokenizer, eos, why_not)
        self.log = DecisionLog(sink=decision_sink, echo=env.DEBUG.get_int(0, 5) >= 5)
        self._core = EngineCore(executor, tokenizer, seed, self.log, options, speculator)
        self._pid = os.getpid()
        # The thread holds the core, not this object: an engine nobody holds any more is closed.
        self._thread = threading.Thread(target=self._core.run, name="aios-engine", daemon=True)
        # It does not wait: the collector may run it in any thread, the engine's own included.
        weakref.finalize(self, self._core.inbox.request_close).atexit = False
        self._atexit = _close_at_exit(self._core, self._thread, self._pid)
        self._thread.start()

    @property
    def executor(self) -> Executor:
        """The executor; to be used while no request runs, as a draft model's is."""
        return self._core.executor

    @property
    def speculation(self) -> SpeculationStats | None:
        """Return how drafts did so far; None without speculation."""
        return None if self._core.speculator is None else self._core.speculator.stats

    @property
    def stats(self) -> EngineStats:
        """Counters since the start; read while running they may be a step old."""
        return self._core.stats

    def generate(
        self,
        prompts: Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Return one output a prompt, in order. If one prompt is refused, none runs.

        params: one for all or one for each; or the fields of SamplingParams as keywords, over the
        model's defaults. Raises RequestError, EngineError, EngineClosedError.
        """
        self._check_alive()
        requests = [
            self._request(prompt, given, f"prompt {i}: " if len(prompts) > 1 else "")
            for i, (prompt, given) in enumerate(self._pairs(prompts, params, fields))
        ]
        self._run(requests)
        return [request.output() for request in requests]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **fields: Any
    ) -> TextStream:
        """Return an iterator of StreamChunk; it is submitted at once. Closing it aborts."""
        return self.open_stream(prompt, params, fields)

    def open_stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        fields: dict[str, Any],
        *,
        on_change: Callable[[], None] | None = None,
        max_waiting: int | None = None,
        progress: Progress | None = None,
    ) -> TextStream:
        """Do what `stream` does; on_change is called in the engine's thread when there is news.

        progress: the tokens that one completion has already; its chunks go on after them.
        Raises QueueFullError, before anything is done, when more than max_waiting requests wait.
        """
        self._check_alive()
        try:
            if max_waiting is not None:
                self._core.inbox.check_queue(1, max_waiting)
            ((prompt, given),) = self._pairs([prompt], params, fields)
            if progress is not None:
                given = replace(given, n=1)
            first = 0 if progress is None else progress.index
            admitted = self.admission.admit(prompt, given)
            request = Request(admitted, self.tokenizer, True, on_change, first)
            if progress is not None:
                request.resume(progress)
            self._core.inbox.submit([request], max_waiting)
        except AiosError as error:
            self._core.metrics.errors[error_code(error)] += 1
            raise
        return TextStream(self, request)

    def probe(self) -> None:
        """Run one token through a step, for `health`; returns at once."""
        generates = not self.admission.why_not
        params = SamplingParams(max_tokens=1, temperature=0)
        admit = self.admission
        request = Request(
            admit.admit([0], params) if generates else admit.admit_for_logits([0]), None, False
        )
        if not generates:
            request.logits = np.empty((1, admit.limits.vocab_size), np.float32)
        request.is_probe = True
        self._core.inbox.submit([request])

    def health(self, stall_s: float = 60.0, probe_s: float = 60.0) -> Health:
        """Return whether the engine lives and is ready; see runtime.health.judge."""
        return judge(
            self._core.pulse,
            alive=self._thread.is_alive() and not self._core.inbox.is_closing,
            at_us=now_us(),
            stall_us=int(stall_s * 1e6),
            probe_us=int(probe_s * 1e6),
        )

    def pulse_ages_us(self) -> tuple[int | None, int | None]:
        """Return how long ago the running step began and the last one ended; None: there is none.

        A thread that has ended shows as a step that began for ever ago.
        """
        if not self._thread.is_alive() or self._core.inbox.is_closing:
            return now_us(), None
        pulse, at_us = self._core.pulse, now_us()
        began, ended = pulse.started_us, pulse.finished_us
        return (
            None if began is None else at_us - began,
            None if ended is None else at_us - ended,
        )

    def metrics(self) -> MetricsSnapshot:
        """Return all metrics of this engine; `.prometheus_text()` is what an exporter serves."""
        return self._core.snapshot()

    def logits(self, token_ids: Seq[int]) -> Floats:
        """Return the raw logits, float32 [T, V], of one sequence from position 0.

        Runs as a request among the others, in chunks that fit the limits; its pages are freed.
        """
        self._check_alive()
        request = Request(self.admission.admit_for_logits(token_ids), None, streams=False)
        # here and not in the engine's thread: too little memory is this caller's problem only
        request.logits = np.empty((len(token_ids), self.admission.limits.vocab_size), np.float32)
        self._run([request])
        assert request.logits is not None
        return request.logits

    def abort(self, request_id: int) -> bool:
        """End a request with finish_reason "abort"; False if it is not running."""
        self._check_alive()
        request = self._core.requests.get(request_id)
        if request is not None:
            self._core.inbox.abort([request])
        return request is not None

    def hold_back(self, num_pages: int) -> None:
        """Keep so many KV pages out of use from the next step on, 0 for none.

        Cached pages go first, then running sequences are preempted; what one sequence of the
        largest length needs always stays.
        """
        self._check_alive()
        if num_pages < 0:
            raise ConfigError(f"num_pages={num_pages} is out of range, expected 0 or more")
        self._core.inbox.hold_back(num_pages)

    def close(self) -> None:
        """End all requests (callers get EngineClosedError) and free everything; idempotent."""
        atexit.unregister(self._atexit)
        _close(self._core, self._thread, self._pid)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_alive(self) -> None:
        if os.getpid() != self._pid:
            raise EngineClosedError(
                "the model belongs to the parent process: its threads did not survive the fork",
                advice='load the model again in this process, or start it with the "spawn" method',
            )

    def _pairs(
        self,
        prompts: Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None,
        fields: dict[str, Any],
    ) -> list[tuple[Prompt, SamplingParams]]:
        if isinstance(prompts, str):
            raise RequestError("prompts: got one text, expected a list", advice="[prompt]")
        if params is None:
            params = self.defaults.params(**fields)
        elif fields:
            raise RequestError(f"got both sampling parameters and {sorted(fields)}, expected one")
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if not isinstance(params, (list, tuple)):
            raise not_params(params)
        if len(params) != len(prompts):
            raise RequestError(f"got {len(params)} sampling parameters for {len(prompts)} prompts")
        return list(zip(prompts, params))

    def _request(
        self, prompt: Prompt, params: SamplingParams, where: str, streams: bool = False
    ) -> Request:
        try:
            return Request(self.admission.admit(prompt, params), self.tokenizer, streams)
        except RequestError as error:
            if not where:
                raise
            raise type(error)(where + error.message, advice=error.advice) from error

    def _run(self, requests: list[Request]) -> None:
        """Submit and wait for all; whatever interrupts the wait aborts them."""
        try:
            self._core.inbox.submit(requests)
            for request in requests:
                request.delivery.wait()
                request.decode_texts()  # while the others run
        except BaseException:
            self._core.inbox.abort(requests)
            raise


class TextStream:
    """Iterator over the chunks of one request. Not closed is aborted when it is dropped.

    The chunks of its n completions come as they are made; `chunk.index` says whose each is.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._ended = False

    @property
    def request_id(self) -> int:
        return self._request.request_id

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._request.admitted.prompt_token_ids

    @property
    def submitted_us(self) -> int:
        """When the engine had it, on the clock of `time.perf_counter`."""
        return self._request.submitted_us

    def is_admitted(self) -> bool:
        """Return whether it was checked and queued; in this process it always is."""
        return True

    @property
    def is_over(self) -> bool:
        """Return whether the last chunk of every completion was taken."""
        return self._request.delivery.is_over

    @property
    def indices(self) -> list[int]:
        """The completions: 0 to n - 1, or the one that goes on."""
        return [sequence.index for sequence in self._request.sequences]

    def completion(self, index: int) -> CompletionOutput:
        """Return one completion; only after its last chunk."""
        return self._request.sequences[self.indices.index(index)].output()

    def output(self) -> RequestOutput:
        """Return the whole result; only after the last chunk."""
        assert self._ended, "the stream has not ended"
        return self._request.output()

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> StreamChunk:
        if self._ended:
            raise StopIteration
        try:
            self._engine._check_alive()
            chunk = self._request.delivery.take(self._engine.tokenizer is not None)
        except BaseException:
            self.close()
            raise
        self._ended = self._request.delivery.is_over
        return chunk

    def take_nowait(self) -> StreamChunk | None:
        """Return the next chunk if there is one; raises what the request ended with."""
        chunk = self._request.delivery.take_nowait(self._engine.tokenizer is not None)
        self._ended = self._ended or self._request.delivery.is_over
        return chunk

    def fail(self, error: Exception) -> None:
        """End it with an error now, whatever the engine's thread is doing."""
        self._request.delivery.finish(error=error)
        self.close()

    def close(self) -> None:
        """Abort the request if it still runs; idempotent."""
        if not self._ended and os.getpid() == self._engine._pid:
            self._ended = True
            self._request.is_gone = True
            self._engine._core.inbox.abort([self._request])

    def __del__(self) -> None:
        self.close()


def _close(core: EngineCore, thread: threading.Thread, pid: int) -> None:
    """Close and wait. A forked child has no thread to ask and nothing of its own to free."""
    if os.getpid() != pid:
        return
    core.inbox.request_close()
    if thread is not threading.current_thread():
        core.closed.wait()


def _close_at_exit(core: EngineCore, thread: threading.Thread, pid: int) -> Any:
    """Register closing for the interpreter's exit, without keeping the core alive for it."""
    held = weakref.ref(core)

    def close() -> None:
        alive = held()
        if alive is not None:
            _close(alive, thread, pid)

    return atexit.register(close)
