"""llama.cpp through llama-cpp-python's C functions, as a peer: decode, batched decode, prefill.

    python -m benchmarks.peers.llama_cpp FILE.gguf THREADS

loads a file, computes one token and ends: what a process start costs. Batches are evaluated, and
nothing is sampled. Settings are llama.cpp's defaults (flash attention "auto", f16 keys and values,
512 tokens a micro-batch).
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

VERSION: str = llama_cpp.__version__
# Share of the read bandwidth that a healthy build reaches at batch 1 (2 cores, AVX2, 30-35 GB/s).
HEALTHY_SHARES = {"BF16": 0.59, "Q8_0": 0.48, "Q4_0": 0.45}
KV_TYPES = {"auto": 1, "int8": 8}  # ggml's f16 and q8_0


class LlamaCpp:
    """A loaded model; `context` makes as many contexts on it as are asked for. Close it."""

    def __init__(self, path: Path, threads: int) -> None:
        _silence()
        llama_cpp.llama_backend_init()
        given = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), given)
        assert self.model, f"llama.cpp does not load {path}"
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(vocab))
        self.threads = threads
        self._contexts: list[Context] = []

    def context(self, tokens: int, sequences: int = 1, kv: str = "auto") -> Context:
        """Return a context for `sequences` of at most `tokens` tokens each."""
        self._contexts.append(Context(self, tokens, sequences, kv))
        return self._contexts[-1]

    def close(self) -> None:
        """Free the contexts and the model."""
        for context in self._contexts:
            context.free()
        llama_cpp.llama_model_free(self.model)


class Context:
    """Keys and values of a few sequences, and what computes on them."""

    def __init__(self, owner: LlamaCpp, tokens: int, sequences: int, kv: str) -> None:
        self.vocab_size = owner.vocab_size
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = tokens * sequences
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = owner.threads
        params.type_k = params.type_v = KV_TYPES[kv]
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(owner.model, params)
        assert self._context, "llama.cpp makes no context"
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._most = int(params.n_batch)
        self._batch = llama_cpp.llama_batch_init(self._most, 0, 1)

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Return float32 [T, vocab] of one sequence."""
        self._clear()
        self._decode([(token, i, 0, True) for i, token in enumerate(ids)])
        rows = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, (len(ids), self.vocab_size)).copy()

    def hold(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Compute the prompts, one a sequence; return their lengths, for `decode`."""
        self._clear()
        for sequence, ids in enumerate(prompts):
            self._prompt(ids, sequence)
        return [len(ids) for ids in prompts]

    def decode(self, lengths: Sequence[int], steps: int) -> float:
        """Return seconds a step, one token of each sequence in one batch, behind `lengths` tokens.

        The context holds afterwards what it held before.
        """
        begin = time.perf_counter()
        for i in range(steps):
            self._decode([(3 + i, n + i, sequence, True) for sequence, n in enumerate(lengths)])
        seconds = (time.perf_counter() - begin) / steps
        for sequence, length in enumerate(lengths):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, length, -1)
        return seconds

    def prefill(self, ids: Sequence[int]) -> float:
        """Return seconds of a prompt, its last token's logits included; the context keeps it."""
        self._clear()
        begin = time.perf_counter()
        self._prompt(ids, 0)
        return time.perf_counter() - begin

    def free(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def _prompt(self, ids: Sequence[int], sequence: int) -> None:
        rows = [(token, i, sequence, i == len(ids) - 1) for i, token in enumerate(ids)]
        for first in range(0, len(rows), self._most):
            self._decode(rows[first : first + self._most])

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute rows of (token, position, sequence, whether logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        failed = llama_cpp.llama_decode(self._context, batch)
        assert failed == 0, f"llama_decode returned {failed}"
        llama_cpp.llama_synchronize(self._context)


@llama_cpp.llama_log_callback
def _drop(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def _silence() -> None:
    llama_cpp.llama_log_set(_drop, ctypes.c_void_p(0))


def health(kind: str, rate: float, bandwidth: float) -> dict[str, Any]:
    """Hold the share of the bandwidth read at batch 1 against a healthy build's, less 20 %."""
    least = 0.8 * HEALTHY_SHARES[kind]
    share = rate / bandwidth
    return {"bytes_a_second": rate, "share": share, "least": least, "void": share < least}


if __name__ == "__main__":
    LlamaCpp(Path(sys.argv[1]), int(sys.argv[2])).context(512).prefill([3, 4, 5, 6, 7, 8])
