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
    """Owner of one completion's text. text[:num_released] may be shown: it will not change."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], include_stop: bool) -> None:
        self.text = ""
        self.num_released = 0
        self._stream = tokenizer.stream()
        self._stops = stops
        self._include_stop = include_stop
        self._cut = False

    def append(self, token_id: int, can_stop: bool) -> str | None:
        """Add a token; return the stop string that it completed, at which the text is cut then.

        can_stop False (below min_tokens): a match that ends here does not count.
        """
        piece = self._stream.push(token_id)
        if not piece:
            return None
        num_old = len(self.text)
        self.text += piece
        if not self._stops:
            self.num_released = len(self.text)
            return None
        match = find_stop(self.text, self._stops, num_old) if can_stop else None
        if match is not None:
            position, stop = match
            self.text = self.text[: position + (len(stop) if self._include_stop else 0)]
            self.num_released = len(self.text)
            self._cut = True
            return stop
        held = 0 if self._include_stop else num_held_back(self.text, self._stops)
        self.num_released = max(self.num_released, len(self.text) - held)
        return None

    def finish(self, last_token_id: int | None) -> None:
        """Release everything, half a character included; a last token may still be added."""
        if not self._cut:
            if last_token_id is not None:
                self.text += self._stream.push(last_token_id)
            self.text += self._stream.flush()
        self.num_released = len(self.text)
