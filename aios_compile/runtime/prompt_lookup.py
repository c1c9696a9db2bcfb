"""Drafts from the text itself: what followed the last few tokens when they occurred before.

Prompt lookup (Saxena 2023, "prompt lookup decoding"; vLLM's method "ngram"). An index from n-gram
to the place after its latest occurrence grows with the tokens, so a step costs the new tokens only
and not the length of the text::

    tokens   a b c d e  ...  x b c d        longest n-gram at the end that is known: b c d
                     ^ latest place after it: drafts are e ...
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from aios_compile.runtime.request import Sequence


class NgramIndex:
    """One sequence's n-grams of min_tokens to max_tokens tokens."""

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        self._sizes = range(max_tokens, min_tokens - 1, -1)  # the longest match wins
        self._after: dict[tuple[int, ...], int] = {}
        self._num_known = 0
        self._match: int | None = None

    def update(self, tokens: Seq[int]) -> None:
        """Take in the tokens that were appended since the last call."""
        for end in range(self._num_known + 1, len(tokens) + 1):
            self._match = None
            for size in self._sizes:
                if size > end:
                    continue
                gram = tuple(tokens[end - size : end])
                if self._match is None:
                    self._match = self._after.get(gram)
                self._after[gram] = end
        self._num_known = len(tokens)

    def draft(self, tokens: Seq[int], count: int) -> list[int]:
        """Return `count` tokens that may follow, or none.

        A match near the end goes round: its own drafts follow, so that a period is continued.
        """
        if self._match is None:
            return []
        found: list[int] = []
        for place in range(self._match, self._match + count):
            own = place - len(tokens)
            found.append(tokens[place] if own < 0 else found[own])
        return found


class PromptLookup:
    """The proposer of method "ngram". See speculator.Proposer."""

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        self._sizes = (min_tokens, max_tokens)
        self._indices: dict[int, NgramIndex] = {}

    def propose(self, wanted: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        return [self._propose_one(sequence, count) for sequence, count in wanted]

    def _propose_one(self, sequence: Sequence, count: int) -> list[int]:
        index = self._indices.get(sequence.sequence_id)
        if index is None:
            index = self._indices[sequence.sequence_id] = NgramIndex(*self._sizes)
        index.update(sequence.tokens)
        return index.draft(sequence.tokens, count)

    def forget(self, sequence_id: int) -> None:
        self._indices.pop(sequence_id, None)
