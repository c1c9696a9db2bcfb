"""How often each token occurred in one sequence, kept up token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aios_compile.runtime.batch import Ints
from aios_compile.sampling_params import SamplingParams


class PenaltyCounts:
    """Unique tokens that penalties look at, with their counts in the output (0: prompt only).

    The repetition penalty looks at prompt and output, the other two at the output only (vLLM's
    meaning), so the prompt is left out when repetition_penalty is 1.
    """

    def __init__(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        prompt = prompt_token_ids if params.repetition_penalty != 1 else ()
        unique = list(dict.fromkeys(prompt))
        self._places = {token: i for i, token in enumerate(unique)}
        self._num_prompt = len(unique)
        self._ids = np.zeros(max(64, 2 * len(unique)), np.int64)
        self._ids[: len(unique)] = unique
        self._counts = np.zeros(len(self._ids), np.int64)

    def add(self, token_id: int) -> None:
        """Count one output token."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1

    def remove(self, token_id: int) -> None:
        """Take back the output token that was counted last."""
        place = self._places[token_id]
        self._counts[place] -= 1
        if self._counts[place] == 0 and place >= self._num_prompt:
            assert place == len(self._places) - 1, "tokens are taken back last in, first out"
            del self._places[token_id]

    def with_ahead(self, ahead: Sequence[int]) -> tuple[Ints, Ints]:
        """Return (ids, counts) as they would be with further output tokens; nothing is changed."""
        extra = [t for t in dict.fromkeys(ahead) if t not in self._places]
        ids = np.concatenate([self.ids, np.array(extra, np.int64)])
        counts = np.concatenate([self.counts, np.zeros(len(extra), np.int64)])
        for token_id in ahead:
            place = self._places.get(token_id)
            counts[len(self._places) + extra.index(token_id) if place is None else place] += 1
        return ids, counts

    @property
    def ids(self) -> Ints:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Ints:
        return self._counts[: len(self._places)]
