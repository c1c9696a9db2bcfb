"""Every error a user can meet, one class a kind of mistake.

A message is lower case without a full stop and says what, where, got and expected; the advice and
the model's source line follow on lines of their own. Broken invariants inside the system are
asserts, not these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AiosError(Exception):
    """Base of all errors raised on purpose. `str()` is the whole text that a user should read."""

    def __init__(
        self, message: str, *, advice: str | None = None, source_line: str | None = None
    ) -> None:
        self.message = message
        self.advice = advice
        self.source_line = source_line
        lines = [message]
        if source_line:
            lines.append(f"  at {source_line}")
        if advice:
            lines.append(f"  try: {advice}")
        super().__init__("\n".join(lines))


class CheckpointError(AiosError):
    """A file of the model folder is missing, damaged, unsafe or does not fit the others."""


class UnsupportedModelError(AiosError):
    """The model asks for mathematics that is not implemented; named, never guessed."""


class CaptureError(AiosError):
    """The forward pass could not be captured as one graph with one region a layer kind."""


class PassError(AiosError):
    """A required pass could not do its work, or the graph that it left is not valid."""


class CodegenError(AiosError):
    """A node of the kernel level has no emitter, or an emitter cannot serve its shapes."""


class BuildError(AiosError):
    """The C++ compiler is missing or failed, or a built library cannot be loaded."""


class CacheError(AiosError):
    """The artefact cache is not private, not writable, damaged or full."""


class ConfigError(AiosError, ValueError):
    """An option has an unknown name or a value outside its range."""


class DeviceMemoryError(ConfigError):
    """A model does not fit a GPU's memory; the message has the table of who needs what."""


class RequestError(AiosError, ValueError):
    """One request is wrong (parameter, token id, length); other requests go on."""


class LogError(AiosError):
    """A decision log or a cost model cannot be read, is damaged, or is of another version."""


class PromptTooLongError(RequestError):
    """The prompt plus the tokens asked for can never fit."""


class EngineError(AiosError, RuntimeError):
    """The engine failed while it ran a request."""


class EngineClosedError(EngineError):
    """The model was closed, or belongs to a parent process from before a fork."""


class EngineStalledError(EngineError):
    """A step has been running for longer than the watchdog allows."""


class EngineDrainingError(EngineClosedError):
    """The engine finishes what it has and takes nothing new."""


class QueueFullError(AiosError, RuntimeError):
    """Too many requests wait already; nothing was allocated. Try again after `retry_after_s`."""

    def __init__(self, message: str, *, advice: str | None = None, retry_after_s: int = 1) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message, advice=advice or f"again in {retry_after_s} s")


class EngineDiedError(EngineError):
    """The engine's process died again and again while it ran this request."""


# The first entry that an error is an instance of is its code: a closed table for metrics and logs.
_CODES: tuple[tuple[type[AiosError], str], ...] = (
    (PromptTooLongError, "prompt_too_long"),
    (RequestError, "bad_request"),
    (QueueFullError, "queue_full"),
    (EngineStalledError, "engine_stalled"),
    (EngineDrainingError, "engine_draining"),
    (EngineClosedError, "engine_closed"),
    (EngineDiedError, "engine_died"),
    (EngineError, "engine_failed"),
)


def error_code(error: BaseException) -> str:
    """Return the code of an error, "internal" for what nobody raised on purpose."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), "internal")


def error_class(code: str) -> type[AiosError]:
    """Return the class of a code; EngineError for one that is not in the table."""
    return next((kind for kind, known in _CODES if known == code), EngineError)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return how an advice begins: with the known name that is most like an unknown one, if any."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}; " if close else ""
