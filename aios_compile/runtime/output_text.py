"""The text of one completion while it grows: whole characters only, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from aios_compile.runtime.stop import find_stop, num_held_back


class TokenStream(Protocol):
    """Streaming detokeniser of one completion."""

    def push(self, index: int) -> str:
        """Return the text that became certain with this id; "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """Return what is held back, half a character as the replacement character."""
        ...


class Tokenizer(Protocol):
    """What the runtime needs of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def stream(self) -> TokenStream: ...


class OutputText:
    """Owner of one completion's text. text[:num_released] may be shown: it will not change.

    Without stop strings nothing depends on the text, so that tokens are decoded when somebody asks
    for it: a caller who waits for the whole text does that in its own thread, not in the engine's.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], include_stop: bool) -> None:
        self._text = ""
        self._num_released = 0
        self._stream = tokenizer.stream()
        self._stops = stops
        self._include_stop = include_stop
        self._later: list[int] = []  # tokens that wait to be decoded
        self._is_over = False  # what is left is to be flushed

    @property
    def text(self) -> str:
        self.decode()
        return self._text

    @property
    def num_released(self) -> int:
        self.decode()
        return self._num_released

    def append(self, token_id: int, can_stop: bool) -> str | None:
        """Add a token; return the stop string that it completed, at which the text is cut then.

        can_stop False (below min_tokens): a match that ends here does not count.
        """
        if not self._stops:
            self._later.append(token_id)
            return None
        piece = self._stream.push(token_id)
        if not piece:
            return None
        num_old = len(self._text)
        self._text += piece
        match = find_stop(self._text, self._stops, num_old) if can_stop else None
        if match is not None:
            position, stop = match
            self._text = self._text[: position + (len(stop) if self._include_stop else 0)]
            self._num_released = len(self._text)
            self._stream = _Ended()
            return stop
        held = 0 if self._include_stop else num_held_back(self._text, self._stops)
        self._num_released = max(self._num_released, len(self._text) - held)
        return None

    def finish(self, last_token_id: int | None) -> None:
        """Release everything, half a character included; a last token may still be added."""
        if last_token_id is not None:
            self._later.append(last_token_id)
        self._is_over = True

    def decode(self) -> None:
        """Take in the tokens that wait, and the end."""
        if self._later:
            self._text += "".join([self._stream.push(index) for index in self._later])
            self._later = []
            self._num_released = len(self._text)
        if self._is_over:
            self._text += self._stream.flush()
            self._stream = _Ended()
            self._num_released = len(self._text)


class _Ended:
    """The stream of a text that was cut or flushed: nothing follows."""

    def push(self, index: int) -> str:
        return ""

    def flush(self) -> str:
        return ""
