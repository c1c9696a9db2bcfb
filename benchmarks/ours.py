"""Our side of the comparisons: one engine, through the Python API, sampling included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import aios_compile
from benchmarks.floors import Work

VECTOR_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1}
POOL_TOKENS = 2560  # small enough that every page of the pool has been touched when time counts


def prompt_ids(vocab_size: int, count: int, seed: int = 0) -> list[int]:
    """Return random token ids below the tokenizer's vocabulary."""
    rng = np.random.default_rng(seed)
    return [int(i) for i in rng.integers(3, min(vocab_size, 1000), count)]


def weight_bytes(program: Any) -> int:
    """Return the bytes that one decode step must read: every packed weight once.

    An embedding table of its own is gathered, a row a token, and not packed.
    """
    packed = [w for w in program.weights if w.packed or len(w.shape) == 1]
    return sum(int(np.prod(w.shape)) * VECTOR_BYTES[w.dtype] for w in packed)


class Ours:
    """A loaded model whose pool holds `tokens` tokens; the default sizes otherwise."""

    def __init__(
        self, folder: Path, weights: str, threads: int, work: Work, cache: Path,
        tokens: int = POOL_TOKENS, kv: str = "auto",
    ) -> None:  # fmt: skip
        pool = int(tokens * work.kv_bytes())
        self.model = aios_compile.load_and_compile(
            folder, quantization=None if weights == "bf16" else weights, num_threads=threads,
            kv_cache_dtype=kv, max_model_len=min(tokens, max_positions(folder)), progress=False,
            kv_cache_memory_bytes=pool, cache_dir=str(cache),
        )  # fmt: skip
        self.weight_bytes = weight_bytes(self.model.program)
        self._prompts = 0

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Return seconds a step of greedy decoding, from the last prompt's first token on."""
        results = self.model.generate(
            [list(ids) for ids in prompts], max_tokens=steps + 1, temperature=0, ignore_eos=True
        )
        metrics = [result.metrics for result in results]
        last = max(m.ttft_us for m in metrics)
        return float(max(m.total_us for m in metrics) - last) / steps / 1e6

    def prefill(self, ids: Sequence[int]) -> float:
        """Return seconds of a prompt to its first token.

        Each prompt is a tenant's of its own: even a random one may begin as another one did.
        """
        self._prompts += 1
        result = self.model.generate(
            list(ids), max_tokens=1, temperature=0, ignore_eos=True, tenant=f"{self._prompts}"
        )
        assert result.metrics.num_cached_tokens == 0, "the prompt was in the prefix cache"
        return float(result.metrics.ttft_us) / 1e6

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Return float32 [T, vocab]."""
        return np.asarray(self.model.engine.logits(list(ids)))

    def close(self) -> None:
        self.model.close()


def max_positions(folder: Path) -> int:
    """Return the positions that the folder's model knows."""
    return int(config_of(folder)["max_position_embeddings"])


def config_of(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
