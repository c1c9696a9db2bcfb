"""What the front keeps of a request: enough to start it again in another engine process."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aios_compile.errors import AiosError
from aios_compile.runtime import wire
from aios_compile.runtime.admission import Prompt
from aios_compile.runtime.delivery import Delivery
from aios_compile.runtime.health import now_us
from aios_compile.runtime.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    StreamChunk,
    TokenLogprobs,
)
from aios_compile.sampling_params import SamplingParams


@dataclass
class _Completion:
    """What the reader of one completion has got."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None

    def take(self, chunk: StreamChunk) -> None:
        self.token_ids += chunk.token_ids
        self.text += chunk.text
        if chunk.logprobs is not None:
            self.logprobs = (self.logprobs or []) + chunk.logprobs
        self.finish_reason = chunk.finish_reason

    def progress(self) -> tuple[Any, ...]:
        logprobs = wire.logprobs_out(self.logprobs)
        return self.index, self.token_ids, len(self.text), logprobs

    def output(self) -> CompletionOutput:
        return CompletionOutput(**vars(self) | {"finish_reason": self.finish_reason or "error"})


class FrontRequest:
    """One request: prompt, parameters with their seed, and all that its reader was given.

    Changed by the front's reader thread alone, but for `delivery`.
    """

    def __init__(
        self,
        request_id: int,
        prompt: Prompt,
        params: SamplingParams | None,
        fields: dict[str, Any],
        on_change: Callable[[], None] | None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids: list[int] | None = None  # when the engine has admitted it
        self.params = params
        self.fields = fields
        self.delivery = Delivery(on_change)
        self.completions = [_Completion(0)]
        self.refusal: AiosError | None = None
        self.output: RequestOutput | None = None
        self.submitted_us = now_us()
        self.first_token_us: int | None = None
        self._told: dict[str, Any] = {}  # by the engine, of the whole request
        self._on_change = on_change

    @property
    def has_begun(self) -> bool:
        return self.first_token_us is not None

    @property
    def has_ended(self) -> bool:
        return all(one.finish_reason is not None for one in self.completions)

    def start_message(self, epoch: int) -> bytes:
        """Return the frame that starts it, or takes it up after what is known."""
        known, goes_on = self.prompt_token_ids, []
        if self.has_begun:
            goes_on = [one.progress() for one in self.completions if one.finish_reason is None]
        return wire.pack(
            {
                "kind": "start",
                "epoch": epoch,
                "request": self.request_id,
                "prompt": self.prompt if known is None else known,
                "params": None if self.params is None else wire.params_fields(self.params),
                "fields": self.fields,
                "progress": goes_on,
            }
        )

    def admit(self, prompt_token_ids: list[int], indices: list[int]) -> None:
        """Take in that the engine has checked it, and which completions it will give."""
        if self.prompt_token_ids is None:
            self.prompt_token_ids = prompt_token_ids
            self.completions = [_Completion(index) for index in indices]
            self.delivery.expect(indices)
            if self._on_change is not None:
                self._on_change()

    def put(self, chunk: StreamChunk) -> None:
        """Keep a chunk and give it to the reader."""
        self._take(chunk)
        self.delivery.put([chunk])

    def end(self, chunk: StreamChunk, values: dict[str, Any]) -> None:
        """End a completion with its last chunk and what the engine says; maybe it was the last."""
        self._take(chunk)
        one = self.completions[chunk.index]
        one.stop_reason = values["stop_reason"]
        one.cumulative_logprob = values["cumulative_logprob"]
        self._told |= values
        if not self.has_ended:
            self.delivery.put([chunk])
            return
        self._finish([chunk])

    def abort(self) -> None:
        """End it with what there is."""
        chunks = [
            StreamChunk("", [], "abort", index=one.index)
            for one in self.completions
            if one.finish_reason is None
        ]
        for chunk in chunks:
            self._take(chunk)
        self._finish(chunks)

    def fail(self, error: AiosError) -> None:
        """End it with an error; one before the first token and admission is a refusal."""
        if self.prompt_token_ids is None:
            self.refusal = error
        self.delivery.finish(error=error)

    def _take(self, chunk: StreamChunk) -> None:
        if chunk.token_ids and self.first_token_us is None:
            self.first_token_us = now_us()
        self.completions[chunk.index].take(chunk)

    def _finish(self, chunks: list[StreamChunk]) -> None:
        first, told = self.first_token_us, self._told
        metrics = RequestMetrics(
            queue_us=told.get("queue_us"),
            ttft_us=None if first is None else first - self.submitted_us,
            total_us=now_us() - self.submitted_us,
            num_preemptions=told.get("num_preemptions", 0),
            num_cached_tokens=told.get("num_cached_tokens", 0),
        )
        prompt_logprobs = wire.logprobs_in(told.get("prompt_logprobs"))
        self.output = RequestOutput(
            self.request_id,
            self.prompt if isinstance(self.prompt, str) else None,
            self.prompt_token_ids or [],
            [one.output() for one in self.completions],
            metrics,
            None if prompt_logprobs is None else [None, *prompt_logprobs],
        )
        self.delivery.finish(chunks)


End = Callable[[FrontRequest, AiosError | None], None]


class FrontStream:
    """Iterator over the chunks of one request of a front, `chunk.index` of n.

    Closing or dropping it aborts.
    """

    def __init__(self, request: FrontRequest, end: End) -> None:
        self._request = request
        self._end = end
        self._ended = False
        self._pid = os.getpid()

    @property
    def request_id(self) -> int:
        return self._request.request_id

    @property
    def is_over(self) -> bool:
        """Return whether the last chunk of every completion was taken."""
        return self._request.delivery.is_over

    def is_admitted(self) -> bool:
        """Return whether the engine has checked and queued it; raise what it was refused with."""
        if self._request.refusal is not None:
            raise self._request.refusal
        return self._request.prompt_token_ids is not None

    def take_nowait(self) -> StreamChunk | None:
        """Return the next chunk if there is one; raises what the request ended with."""
        return self._note(self._request.delivery.take_nowait(False))

    def output(self) -> RequestOutput:
        """Return the whole result; only after the last chunk."""
        assert self._request.output is not None, "the stream has not ended"
        return self._request.output

    def __iter__(self) -> FrontStream:
        return self

    def __next__(self) -> StreamChunk:
        if self._ended:
            raise StopIteration
        try:
            chunk = self._note(self._request.delivery.take(False))
        except BaseException:
            self.close()
            raise
        assert chunk is not None
        return chunk

    def _note(self, chunk: StreamChunk | None) -> StreamChunk | None:
        self._ended = self._ended or self._request.delivery.is_over
        return chunk

    def fail(self, error: AiosError) -> None:
        """End it with an error now."""
        self._ended = True
        self._end(self._request, error)

    def close(self) -> None:
        """Abort the request if it still runs; idempotent."""
        if not self._ended and os.getpid() == self._pid:
            self._end(self._request, None)
            self._ended = True

    def __del__(self) -> None:
        with suppress(AttributeError):
            self.close()
