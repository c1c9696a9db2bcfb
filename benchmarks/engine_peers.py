"""The same requests through transformers (static and continuous batches) and llama.cpp.

All decode greedily without an end-of-sequence token. llama.cpp has a server's loop written out:
as many sequences as slots, a new prompt as soon as one is free, one batch of all; each group's
prefix is computed once and its cells are shared.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine_workload import CONCURRENT, NUM_GROUPS, Outcome, Workload


class StaticBatches:
    """transformers' generate on batches of 16, padded on the left, each to its longest output."""

    name = f"transformers, static batches of {CONCURRENT}"

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model.eval()

    def run(self, work: Workload) -> Outcome:
        begin, tokens = time.perf_counter(), []
        for start in range(0, len(work.prompts), CONCURRENT):
            prompts = work.prompts[start : start + CONCURRENT]
            counts = work.output_tokens[start : start + CONCURRENT]
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
            with torch.no_grad():
                got = self.model.generate(
                    ids, attention_mask=mask, max_new_tokens=max(counts), do_sample=False,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            tokens += [row[width : width + n].tolist() for row, n in zip(got, counts)]
        return Outcome(time.perf_counter() - begin, tokens, [])


class ContinuousBatches:
    """transformers' ContinuousBatchingManager, which also runs on a CPU; blocks are shared."""

    name = "transformers, continuous batching"

    def __init__(self, static: StaticBatches) -> None:
        from transformers import GenerationConfig

        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # psutil, eos
        self.model = static.model
        self.config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)

    def run(self, work: Workload) -> Outcome:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        longest = max(map(len, work.prompts)) + max(work.output_tokens)
        settings = ContinuousBatchingConfig(
            block_size=16, num_blocks=CONCURRENT * (longest // 16 + 2) * 2, max_batch_tokens=512,
            max_requests_per_batch=CONCURRENT, use_cuda_graph=False,
        )  # fmt: skip
        return continuous(self.model, self.config, settings, work.prompts, work.output_tokens)


def continuous(
    model: Any, config: Any, settings: Any, prompts: list[list[int]], counts: list[int]
) -> Outcome:
    """Serve requests that are all there at the start, each with a length of its own."""
    manager = model.init_continuous_batching(config, settings)
    manager.start()
    try:
        begin = time.perf_counter()
        ids = [
            manager.add_request(prompt, max_new_tokens=count, request_id=f"r{i}")
            for i, (prompt, count) in enumerate(zip(prompts, counts))
        ]
        done: dict[str, list[int]] = {}
        while len(done) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"continuous batching failed: {result.error}")
                done[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("the continuous batching thread ended")
        seconds = time.perf_counter() - begin
    finally:
        manager.stop(block=True, timeout=10)
        manager.destroy()
    return Outcome(seconds, [done[i] for i in ids], [])


class LlamaCpp:
    """llama.cpp's decode over 16 parallel sequences; batch and cache as its server uses them."""

    def __init__(self, gguf: Path, threads: int, capacity: int) -> None:
        import llama_cpp

        self.api, self.name = llama_cpp, f"llama.cpp, {CONCURRENT} at once, {gguf.stem}"
        self._llama = llama_cpp.Llama(  # loads the model; its own context is not used
            str(gguf), n_ctx=64, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        given = llama_cpp.llama_context_default_params()
        given.n_ctx, given.n_batch, given.n_ubatch = capacity, 512, 512
        given.n_threads = given.n_threads_batch = threads
        given.n_seq_max, given.kv_unified, given.no_perf = CONCURRENT + NUM_GROUPS, True, True
        self._context = llama_cpp.llama_init_from_model(self._llama.model, given)
        assert self._context, "llama.cpp gave no context"
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = self._llama.n_vocab()
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def close(self) -> None:
        self.api.llama_batch_free(self._batch)
        self.api.llama_free(self._context)
        self._llama.close()

    def run(self, work: Workload) -> Outcome:
        api = self.api
        api.llama_memory_clear(self._memory, True)
        tokens: list[list[int]] = [[] for _ in work.prompts]
        waiting, slots = deque(range(len(work.prompts))), list(range(CONCURRENT))
        running: dict[int, int] = {}  # request -> slot
        known: set[int] = set()  # groups whose prefix lies in the sequence behind the slots
        begin, first = time.perf_counter(), [0.0] * len(work.prompts)
        while waiting or running:
            rows: list[tuple[int, int, int, bool]] = []  # token, position, sequence, wants logits
            order: list[int] = []
            for number, slot in running.items():
                place = len(work.prompts[number]) + len(tokens[number]) - 1
                rows.append((tokens[number][-1], place, slot, True))
                order.append(number)
            fresh: dict[int, int] = {}
            while waiting and slots:
                number = waiting[0]
                prompt, group = work.prompts[number], number % NUM_GROUPS
                start = work.shared_tokens if group in known else 0
                if len(rows) + len(prompt) - start > 512 or group in fresh:
                    break
                waiting.popleft()
                slot = running[number] = slots.pop()
                if start:
                    api.llama_memory_seq_cp(self._memory, CONCURRENT + group, slot, 0, start)
                else:
                    fresh[group] = slot
                last = len(prompt) - 1
                rows += [(prompt[p], p, slot, p == last) for p in range(start, last + 1)]
                order.append(number)
            sampled = self._decode(rows)
            for group, slot in fresh.items():
                behind = CONCURRENT + group
                api.llama_memory_seq_cp(self._memory, slot, behind, 0, work.shared_tokens)
                known.add(group)
            for number, token in zip(order, sampled):
                if not tokens[number]:
                    first[number] = time.perf_counter() - begin
                tokens[number].append(token)
                if len(tokens[number]) == work.output_tokens[number]:
                    slot = running.pop(number)
                    api.llama_memory_seq_rm(self._memory, slot, -1, -1)
                    slots.append(slot)
        return Outcome(time.perf_counter() - begin, tokens, first)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute the rows; return the most likely next token of those that want one."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        failed = self.api.llama_decode(self._context, batch)
        assert not failed, f"llama_decode returned {failed}"
        logits = [
            self.api.llama_get_logits_ith(self._context, i) for i, row in enumerate(rows) if row[3]
        ]
        shape = (self._vocab,)
        return [int(np.ctypeslib.as_array(address, shape).argmax()) for address in logits]


def has_llama_cpp() -> str:
    """Return "" if llama.cpp can be used here, else why not."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""
