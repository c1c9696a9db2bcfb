"""Messages between the front and the engine's process: length-prefixed msgpack, plain data only.

A frame is four bytes, big endian, the payload's length, then one msgpack map. Every message names
its kind, its epoch (which start of the engine's process it belongs to) and its request (0: none)::

    front -> engine   start, abort, probe, close
    engine -> front   ready, admitted, chunks, end, error, pulse
"""

from __future__ import annotations

import dataclasses
import operator
import select
import socket
import struct
from collections.abc import Mapping
from typing import Any

import msgpack

from aios_compile.errors import AiosError, EngineError, RequestError, error_class, error_code
from aios_compile.runtime.metrics import Family, MetricsSnapshot, Sample
from aios_compile.runtime.outputs import Logprob, StreamChunk, TokenLogprobs
from aios_compile.sampling_params import SamplingParams

MAX_FRAME_BYTES = 1 << 28  # the log-probabilities of a long prompt are the largest; rule: bounded
_LENGTH = struct.Struct(">I")
_EVERY_MESSAGE = {"kind": str, "epoch": int, "request": int}


class Connection:
    """One end of the socket. Several threads may send if they take turns; one receives."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)

    def send(self, frame: bytes) -> None:
        """Send what `pack` made; raises OSError when the other end is gone."""
        self._socket.sendall(frame)

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """Return the next message, None when the other end is gone.

        Raises TimeoutError, and EngineError for a frame that is none of ours. The socket stays a
        blocking one: a timeout of its own would cut off what others send.
        """
        while True:
            if len(self._buffer) >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(self._buffer)
                if size > MAX_FRAME_BYTES:
                    raise EngineError(f"a frame of {size} bytes, at most {MAX_FRAME_BYTES}")
                if len(self._buffer) >= _LENGTH.size + size:
                    return self._pop(size)
            try:
                if timeout_s is not None and not self._poll.poll(timeout_s * 1000):
                    raise TimeoutError
                data = self._socket.recv(1 << 18)
            except ConnectionError:
                return None
            if not data:
                return None  # half a frame is no message
            self._buffer += data

    def _pop(self, size: int) -> dict[str, Any]:
        payload = bytes(memoryview(self._buffer)[_LENGTH.size : _LENGTH.size + size])
        del self._buffer[: _LENGTH.size + size]
        try:
            message = msgpack.unpackb(payload, strict_map_key=False)
        except (ValueError, TypeError) as error:  # all that msgpack raises for what it cannot read
            raise EngineError(f"a frame that is not msgpack: {type(error).__name__}") from error
        if not isinstance(message, dict) or any(
            type(message.get(name)) is not kind for name, kind in _EVERY_MESSAGE.items()
        ):
            raise EngineError("a message without its kind, epoch and request")
        return message

    def close(self) -> None:
        self._socket.close()


def pack(message: Mapping[str, Any]) -> bytes:
    """Return the frame of a message; raise RequestError for what is no plain data."""
    try:
        payload: bytes = msgpack.packb(message, default=_plain)
    except OverflowError:
        raise RequestError("a parameter is a whole number of more than 64 bits") from None
    except UnicodeEncodeError:
        raise RequestError("a text of the request is not valid Unicode") from None
    if len(payload) > MAX_FRAME_BYTES:
        raise RequestError(f"a message of {len(payload)} bytes, at most {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


def _plain(value: Any) -> Any:
    """Return what msgpack knows for numbers and collections of other libraries."""
    for convert in (operator.index, float):
        try:
            return convert(value)
        except TypeError:
            continue
    if isinstance(value, Mapping):
        return dict(value)
    try:
        return list(value)
    except TypeError:
        kind = type(value).__name__
        raise RequestError(f"a parameter is of type {kind}, expected plain data") from None


def as_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as the other end will see them, independent of the caller's objects."""
    found: dict[str, Any] = msgpack.unpackb(pack(values)[_LENGTH.size :], strict_map_key=False)
    return found


def params_fields(params: SamplingParams) -> dict[str, Any]:
    """Return the keywords that make the same parameters again."""
    return {item.name: getattr(params, item.name) for item in dataclasses.fields(params)}


def logprobs_out(rows: list[TokenLogprobs] | None) -> list[Any] | None:
    """Return log-probabilities as lists: a row holds (id, logprob, rank, text) in their order."""
    if rows is None:
        return None
    return [[(i, e.logprob, e.rank, e.decoded_token) for i, e in row.items()] for row in rows]


def logprobs_in(rows: list[Any] | None) -> list[TokenLogprobs] | None:
    """Do the opposite of logprobs_out; floats keep their bits."""
    if rows is None:
        return None
    return [{i: Logprob(value, rank, text) for i, value, rank, text in row} for row in rows]


def chunk_out(chunk: StreamChunk) -> list[Any]:
    logprobs = logprobs_out(chunk.logprobs)
    return [chunk.text, chunk.token_ids, chunk.finish_reason, logprobs, chunk.index]


def chunk_in(values: list[Any]) -> StreamChunk:
    text, token_ids, finish_reason, logprobs, index = values
    return StreamChunk(text, token_ids, finish_reason, logprobs_in(logprobs), index)


def error_out(error: BaseException) -> list[Any]:
    """Return (code, message, advice). What was not raised on purpose keeps its text to itself."""
    if isinstance(error, AiosError):
        return [error_code(error), error.message, error.advice]
    return ["internal", f"the engine met a {type(error).__name__}", None]


def error_in(values: list[Any]) -> AiosError:
    code, message, advice = values
    return error_class(code)(message, advice=advice)


def metrics_out(snapshot: MetricsSnapshot) -> list[Any]:
    return [
        [f.name, f.kind, f.help, [(s.value, s.labels, s.suffix) for s in f.samples]]
        for f in snapshot.families
    ]


def metrics_in(families: list[Any]) -> tuple[Family, ...]:
    return tuple(
        Family(name, kind, text, tuple(Sample(v, _labels(pairs), s) for v, pairs, s in samples))
        for name, kind, text, samples in families
    )


def _labels(pairs: list[list[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((key, value) for key, value in pairs)
