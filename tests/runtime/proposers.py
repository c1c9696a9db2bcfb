"""Proposers for tests: one that knows the answer, and is wrong as often as asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from aios_compile.runtime.request import Sequence


class Oracle:
    """Proposes the tokens of `answers` (by prompt and index); one in `wrong` is another one."""

    def __init__(
        self, answers: Mapping[tuple[tuple[int, ...], int], Seq[int]], wrong: float
    ) -> None:
        self.answers = answers
        self.wrong = wrong
        self.random = random.Random(7)
        self.known: set[int] = set()

    def propose(self, wanted: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        found = []
        for sequence, count in wanted:
            self.known.add(sequence.sequence_id)
            prompt = tuple(sequence.admitted.prompt_token_ids)
            answer = self.answers.get((prompt, sequence.index), ())
            done = sequence.num_output_tokens
            tokens = list(answer[done : done + count])
            for i in range(len(tokens)):
                if self.random.random() < self.wrong:
                    tokens[i] = self.random.randrange(50)
            found.append(tokens)
        return found

    def forget(self, sequence_id: int) -> None:
        self.known.discard(sequence_id)


class Fixed:
    """Proposes what a function says."""

    def __init__(self, propose: Callable[[Sequence, int], list[int]]) -> None:
        self._propose = propose

    def propose(self, wanted: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        return [self._propose(sequence, count) for sequence, count in wanted]

    def forget(self, sequence_id: int) -> None:
        pass
