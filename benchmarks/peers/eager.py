"""transformers as it comes, and under torch.compile (Inductor), as peers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StaticCache

transformers.utils.logging.disable_progress_bar()


def load(folder: Path, dtype: str) -> Any:
    """Return the folder's model in float32 or bfloat16."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


class Eager:
    """transformers eager with a cache that grows."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Return seconds a step of greedy decoding, all sequences in one batch."""
        out = self.model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        begin = time.perf_counter()
        for _ in range(steps):
            out = self.model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - begin) / steps

    @torch.no_grad()
    def prefill(self, ids: Sequence[int]) -> float:
        """Return seconds of a prompt, the last token's logits included."""
        begin = time.perf_counter()
        self.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begin


class Compiled:
    """The same model with a cache of fixed size, compiled by Inductor for one sequence.

    Two graphs: a prompt (one for each length) and a token. `positions` is what fits the cache.
    """

    def __init__(self, model: Any, positions: int) -> None:
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=positions)
        self._forward = torch.compile(self._plain, dynamic=False, fullgraph=True)

    def _plain(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._model(  # type: ignore[no-any-return]
            input_ids=ids, position_ids=positions[None], cache_position=positions,
            past_key_values=self._cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip

    @torch.no_grad()
    def run(self, ids: Sequence[int], first: int) -> torch.Tensor:
        """Return logits [1, 1, vocab] of the last of `ids`, which begin at position `first`."""
        positions = torch.arange(first, first + len(ids))
        return self._forward(torch.tensor([ids]), positions)

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Return seconds a step of greedy decoding of one sequence, from its first token on.

        The cache has a fixed size and is read whole: how full it is does not change the time, and
        a graph for a prompt of this length would take another minute.
        """
        (ids,) = prompts
        self._cache.reset()
        token = ids[0]
        begin = time.perf_counter()
        for i in range(steps):
            token = int(self.run([token], i)[0, -1].argmax())
        return (time.perf_counter() - begin) / steps

    def prefill(self, ids: Sequence[int]) -> float:
        """Return seconds of a prompt."""
        self._cache.reset()
        begin = time.perf_counter()
        self.run(ids, 0)
        return time.perf_counter() - begin
