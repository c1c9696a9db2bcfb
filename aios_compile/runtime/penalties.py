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

    @property
    def ids(self) -> Ints:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Ints:
        return self._counts[: len(self._places)]
