"""The engine's end of the socket: runs an Engine for a front in another process.

main thread: receives commands, admits, aborts. sender thread: chunks of all streams that have news
in one message, and a pulse several times a second. When the front is gone, so is the engine.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from aios_compile.errors import AiosError
from aios_compile.runtime import wire
from aios_compile.runtime.engine import Engine, TextStream
from aios_compile.runtime.outputs import StreamChunk
from aios_compile.runtime.request import Progress
from aios_compile.sampling_params import SamplingParams

PULSE_S = 0.1


class EngineServer:
    """Serves one connection until it ends; owns neither the engine nor the connection."""

    def __init__(self, engine: Engine, connection: wire.Connection, epoch: int) -> None:
        self._engine = engine
        self._connection = connection
        self._epoch = epoch
        self._send_lock = threading.Lock()
        # by request: one stream, or one a completion that goes on; guarded by _news, as is _changed
        self._streams: dict[int, list[TextStream]] = {}
        self._news = threading.Condition()
        self._changed: dict[int, None] = {}
        self._is_over = False

    def serve(self) -> None:
        """Say ready, then serve until the front closes or is gone."""
        limits = self._engine.admission.limits
        self._send("ready", 0, max_running=limits.max_running)
        sender = threading.Thread(target=self._send_news, name="aios-sender", daemon=True)
        sender.start()
        try:
            while (message := self._connection.receive()) is not None:
                if message["epoch"] != self._epoch:
                    continue  # meant for one that is gone
                if message["kind"] == "close":
                    return
                self._handle(message)
        finally:
            with self._news:
                self._is_over = True
                self._news.notify()
            sender.join(5)

    def _handle(self, message: dict[str, Any]) -> None:
        kind, number = message["kind"], message["request"]
        if kind == "start":
            try:
                self._start(number, message)
            except AiosError as error:
                self._send("error", number, error=wire.error_out(error))
        elif kind == "abort":
            with self._news:
                streams = list(self._streams.get(number, ()))
            for stream in streams:
                stream.close()
        elif kind == "probe":
            self._engine.probe()

    def _start(self, number: int, message: dict[str, Any]) -> None:
        params = message["params"]
        going_on: list[Progress | None] = [
            Progress(token_ids, num_chars, wire.logprobs_in(logprobs), index)
            for index, token_ids, num_chars, logprobs in message["progress"]
        ]
        streams = [
            self._engine.open_stream(
                message["prompt"],
                None if params is None else SamplingParams(**params),
                message["fields"],
                on_change=lambda: self._notify(number),
                progress=progress,
            )
            for progress in going_on or [None]
        ]
        indices = [index for stream in streams for index in stream.indices]
        ids = streams[0].prompt_token_ids
        self._send("admitted", number, prompt_token_ids=ids, indices=indices)
        with self._news:
            self._streams[number] = streams
        self._notify(number)  # what came before it was known here

    def _notify(self, number: int) -> None:
        with self._news:
            self._changed[number] = None
            self._news.notify()

    def _send_news(self) -> None:
        next_pulse = 0.0
        try:
            while not self._is_over:
                with self._news:
                    self._news.wait_for(lambda: self._changed or self._is_over, PULSE_S)
                    changed, self._changed = self._changed, {}
                    streams = [(i, s) for i in changed for s in self._streams.get(i, ())]
                self._send_chunks(streams)
                if time.monotonic() >= next_pulse:
                    next_pulse = time.monotonic() + PULSE_S
                    self._send_pulse()
        except OSError:
            pass  # the front is gone; the main thread sees it too

    def _send_chunks(self, streams: list[tuple[int, TextStream]]) -> None:
        chunks, ended = [], []
        for number, stream in streams:
            try:
                while (chunk := stream.take_nowait()) is not None:
                    if chunk.finish_reason is None:
                        chunks.append((number, wire.chunk_out(chunk)))
                    else:
                        ended.append((number, wire.chunk_out(chunk), output_out(stream, chunk)))
                    if stream.is_over:
                        self._forget(number, stream)
                        break
            except Exception as error:  # noqa: BLE001 - it belongs to that request's reader
                self._forget(number, stream)
                self._send("error", number, error=wire.error_out(error))
        if chunks:
            self._send("chunks", 0, chunks=chunks)
        for number, last, output in ended:
            self._send("end", number, chunk=last, output=output)

    def _forget(self, number: int, stream: TextStream) -> None:
        with self._news:
            left = [s for s in self._streams.get(number, ()) if s is not stream]
            self._streams[number] = left
            if not left:
                del self._streams[number]

    def _send_pulse(self) -> None:
        pulse = self._engine.pulse_ages_us()
        metrics = wire.metrics_out(self._engine.metrics())
        self._send("pulse", 0, ages_us=pulse, metrics=metrics)

    def _send(self, kind: str, number: int, **values: Any) -> None:
        frame = wire.pack({"kind": kind, "epoch": self._epoch, "request": number, **values})
        with self._send_lock:
            self._connection.send(frame)


def output_out(stream: TextStream, last: StreamChunk) -> dict[str, Any]:
    """Return what the front cannot know by itself; it has kept tokens, text and log-probs.

    What is one for all completions goes with the one that ends last.
    """
    one = stream.completion(last.index)
    found: dict[str, Any] = {
        "stop_reason": one.stop_reason,
        "cumulative_logprob": one.cumulative_logprob,
    }
    if not stream.is_over:
        return found
    output = stream.output()
    rows = output.prompt_logprobs
    prompt = None if rows is None else [row for row in rows if row is not None]
    return {
        **found,
        "prompt_logprobs": None if prompt is None else wire.logprobs_out(prompt),
        "queue_us": output.metrics.queue_us,
        "num_preemptions": output.metrics.num_preemptions,
        "num_cached_tokens": output.metrics.num_cached_tokens,
    }
