"""What the front keeps of a request: enough to start it again in another engine process."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aios_compile.errors import AiosError
from aios_compile.runtime import wire
from aios_compile.runtime.admission import Prompt
from aios_compile.runtime.health import now_us
from aios_compile.runtime.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    StreamChunk,
    TokenLogprobs,
)
from aios_compile.runtime.request import Delivery
from aios_compile.sampling_params import SamplingParams


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
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprobs] | None = None
        self.refusal: AiosError | None = None
        self.output: RequestOutput | None = None
        self.submitted_us = now_us()
        self.first_token_us: int | None = None
        self._on_change = on_change

    def start_message(self, epoch: int) -> bytes:
        """Return the frame that starts it, or takes it up after what is known."""
        known = self.prompt_token_ids
        return wire.pack(
            {
                "kind": "start",
                "epoch": epoch,
                "request": self.request_id,
                "prompt": self.prompt if known is None else known,
                "params": None if self.params is None else wire.params_fields(self.params),
                "fields": self.fields,
                "token_ids": self.token_ids,
                "num_chars": len(self.text),
                "logprobs": wire.logprobs_out(self.logprobs),
            }
        )

    def admit(self, prompt_token_ids: list[int]) -> None:
        if self.prompt_token_ids is None:
            self.prompt_token_ids = prompt_token_ids
            if self._on_change is not None:
                self._on_change()

    def take(self, chunk: StreamChunk) -> None:
        """Keep what goes to the reader."""
        if chunk.token_ids and self.first_token_us is None:
            self.first_token_us = now_us()
        self.token_ids += chunk.token_ids
        self.text += chunk.text
        if chunk.logprobs is not None:
            self.logprobs = (self.logprobs or []) + chunk.logprobs

    def put(self, chunk: StreamChunk) -> None:
        self.take(chunk)
        self.delivery.put(chunk)

    def finish(self, chunk: StreamChunk, values: dict[str, Any]) -> None:
        """End it with its last chunk and what the engine says of the whole (none: an abort)."""
        self.take(chunk)
        first = self.first_token_us
        metrics = RequestMetrics(
            queue_us=values.get("queue_us"),
            ttft_us=None if first is None else first - self.submitted_us,
            total_us=now_us() - self.submitted_us,
            num_preemptions=values.get("num_preemptions", 0),
            num_cached_tokens=values.get("num_cached_tokens", 0),
        )
        completion = CompletionOutput(
            index=0,
            text=self.text,
            token_ids=self.token_ids,
            finish_reason=chunk.finish_reason or "error",
            stop_reason=values.get("stop_reason"),
            logprobs=self.logprobs,
            cumulative_logprob=values.get("cumulative_logprob"),
        )
        prompt_logprobs = wire.logprobs_in(values.get("prompt_logprobs"))
        self.output = RequestOutput(
            self.request_id,
            self.prompt if isinstance(self.prompt, str) else None,
            self.prompt_token_ids or [],
            [completion],
            metrics,
            None if prompt_logprobs is None else [None, *prompt_logprobs],
        )
        self.delivery.finish(chunk)

    def fail(self, error: AiosError) -> None:
        """End it with an error; one before the first token and admission is a refusal."""
        if self.prompt_token_ids is None:
            self.refusal = error
        self.delivery.finish(StreamChunk(""), error)


End = Callable[[FrontRequest, AiosError | None], None]


class FrontStream:
    """Iterator over the chunks of one request of a front. Closing or dropping it aborts."""

    def __init__(self, request: FrontRequest, end: End) -> None:
        self._request = request
        self._end = end
        self._ended = False
        self._pid = os.getpid()

    @property
    def request_id(self) -> int:
        return self._request.request_id

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
        self._ended = self._ended or (chunk is not None and chunk.finish_reason is not None)
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
