"""Where the engine's thread leaves results and one caller's thread takes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from aios_compile.runtime.outputs import StreamChunk, TokenLogprobs


class _Completion:
    """What one completion's reader has not taken yet."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None
        self._finish_reason: str | None = None
        self.is_over = False  # its last chunk was taken

    def add(self, chunk: StreamChunk) -> None:
        self._text.append(chunk.text)
        self._token_ids += chunk.token_ids
        if chunk.logprobs is not None:
            self._logprobs = (self._logprobs or []) + chunk.logprobs
        self._finish_reason = chunk.finish_reason or self._finish_reason

    def has_news(self, with_text: bool) -> bool:
        if self.is_over:
            return False
        ended = self._finish_reason is not None
        return ended or any(self._text) or (bool(self._token_ids) and not with_text)

    def take(self) -> StreamChunk:
        self.is_over = self._finish_reason is not None
        text, ids, logprobs = "".join(self._text), self._token_ids, self._logprobs
        self._text, self._token_ids, self._logprobs = [], [], None
        return StreamChunk(text, ids, self._finish_reason, logprobs, self._index)


class Delivery:
    """One request's results. One thread gives, one takes.

    Bounded: what a slow reader has not taken is merged into one chunk a completion. on_change:
    called in the giving thread after each change, for a reader that does not block.
    """

    def __init__(self, on_change: Callable[[], None] | None = None, indices: Iterable[int] = (0,)):
        self._changed = threading.Condition(threading.Lock())
        self._on_change = on_change
        self._completions = {i: _Completion(i) for i in indices}
        self._error: Exception | None = None
        self._done = False

    def expect(self, indices: Iterable[int]) -> None:
        """Know which completions there are; before the first chunk."""
        with self._changed:
            self._completions = {i: _Completion(i) for i in indices}

    @property
    def is_over(self) -> bool:
        """Return whether the last chunk of every completion was taken."""
        return all(completion.is_over for completion in self._completions.values())

    def put(self, chunks: Iterable[StreamChunk]) -> None:
        """Add chunks of a request that goes on."""
        with self._changed:
            self._add(chunks)
        if self._on_change is not None:
            self._on_change()

    def finish(self, chunks: Iterable[StreamChunk] = (), error: Exception | None = None) -> None:
        """Add the last chunks and end: each completion with its reason, or all with an error."""
        with self._changed:
            if self._done:
                return
            self._error, self._done = error, True
            self._add(chunks)
        if self._on_change is not None:
            self._on_change()

    def _add(self, chunks: Iterable[StreamChunk]) -> None:
        for chunk in chunks:
            self._completions[chunk.index].add(chunk)
        self._changed.notify_all()

    def wait(self) -> None:
        """Wait for the end; raise the error if there is one."""
        with self._changed:
            while not self._done:
                self._changed.wait()
        if self._error is not None:
            raise self._error

    def take(self, with_text: bool) -> StreamChunk:
        """Wait for new text (or just tokens, when there is no tokenizer) or an end; return it."""
        with self._changed:
            while (found := self._news(with_text)) is None:
                self._changed.wait()
            return found.take()

    def take_nowait(self, with_text: bool) -> StreamChunk | None:
        """Return what `take` would without waiting, None if it would wait."""
        with self._changed:
            found = self._news(with_text)
            return None if found is None else found.take()

    def _news(self, with_text: bool) -> _Completion | None:
        """Return a completion that has something; raise the error that the request ended with."""
        if self._error is not None:
            raise self._error
        for index, completion in self._completions.items():
            if completion.has_news(with_text):
                # to the end of the line: each gets its turn
                self._completions[index] = self._completions.pop(index)
                return completion
        return None
