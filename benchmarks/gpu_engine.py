"""The engine on a GPU: many requests of mixed lengths, all there at the start, beside a floor."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_clock import Clock

GENERATE_BATCH = 64


def workload(options: argparse.Namespace, vocabulary: int) -> list[tuple[list[int], int]]:
    """Return (prompt, new tokens) of each request, seeded."""
    draw = np.random.default_rng(0)
    first, last = options.lengths
    sizes = draw.integers(first, last + 1, (options.requests, 2))
    return [(draw.integers(0, vocabulary, a).tolist(), int(b)) for a, b in sizes]


def engine_row(shape: str, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Serve the workload; report the start, throughput and what the host adds to a step."""
    import aios_compile
    from benchmarks.shapes import config_of, make

    folder = make(shape, Path(tempfile.mkdtemp(prefix="aios-gpu-engine-")) / shape, options.layers)
    work = workload(options, min(1000, config_of(shape)["vocab_size"]))
    clock.bytes_per_us(), clock.flops_per_us  # before the model has taken the card's memory
    begin = time.perf_counter()
    sizes = {} if clock.cuda else {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    with aios_compile.load_and_compile(
        folder, device=options.device, max_model_len=2 * options.lengths[1] + 16, progress=False,
        cache_dir=str(folder.parent / "cache"), **sizes,
    ) as model:  # fmt: skip
        ready = time.perf_counter() - begin
        stats = model.engine.stats
        executor: Any = model.engine.executor
        steps, step_us, waited = stats.num_steps, stats.executor_us, executor.waited_us
        params = [
            aios_compile.SamplingParams(max_tokens=n, temperature=0, ignore_eos=True)
            for _, n in work
        ]
        start = time.perf_counter()
        model.generate([prompt for prompt, _ in work], params)
        seconds = time.perf_counter() - start
        steps, step_us = stats.num_steps - steps, stats.executor_us - step_us
        tokens = sum(len(p) + n for p, n in work)
        floor = floor_seconds(model, work, clock)
        return {
            "ready_seconds": ready, "seconds": seconds, "requests": len(work), "steps": steps,
            "tokens_per_s": tokens / seconds, "new_tokens_per_s": sum(n for _, n in work) / seconds,
            "step_us": step_us / steps, "busy": step_us / seconds / 1e6,
            "host_us": (seconds * 1e6 - (executor.waited_us - waited)) / steps,
            "steps_ahead": stats.num_steps_ahead, "steps_in_vain": stats.num_steps_in_vain,
            "floor_seconds": floor, "share": floor / seconds,
            "late_compilations": executor.num_late_compilations,
            "late_captures": executor.num_late_captures,
        }  # fmt: skip


def floor_seconds(model: Any, work: list[tuple[list[int], int]], clock: Clock) -> float:
    """Return the least time for a workload, whoever schedules it: prompts at the bf16 peak, and for
    new tokens each key and value of the context read once, and all weights once for as many
    sequences as may run together.
    """
    from aios_compile.runtime.program_runner import state_page_bytes

    matrices = [w for w in model.program.weights if len(w.shape) == 2]
    weights = sum(int(np.prod(w.shape)) * 2 for w in matrices)
    page, tokens = sum(state_page_bytes(model.program)), model.limits.page_size
    cached = sum(n * (len(prompt) + n / 2) for prompt, n in work) * page / tokens
    rounds = max(sum(n for _, n in work) / model.limits.max_num_seqs, max(n for _, n in work))
    prefill = sum(len(prompt) for prompt, _ in work) * weights / clock.flops_per_us
    return float((cached + rounds * weights) / clock.bytes_per_us() + prefill) / 1e6


def transformers_model(
    shape: str, options: argparse.Namespace, clock: Clock
) -> tuple[Any, list[tuple[list[int], int]]]:
    """Return transformers' model of a shape where the clock runs, and the workload."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.shapes import config_of, make

    folder = make(shape, Path(tempfile.mkdtemp(prefix="aios-gpu-hf-")) / shape, options.layers)
    work = workload(options, min(1000, config_of(shape)["vocab_size"]))
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(clock.torch_device), work


def generate_row(shape: str, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Serve the workload with transformers' generate: batches as large as ours, padded on the left,
    each to its longest output.
    """
    import torch

    model, work = transformers_model(shape, options, clock)
    begin = time.perf_counter()
    for first in range(0, len(work), GENERATE_BATCH):
        some = work[first : first + GENERATE_BATCH]
        width = max(len(prompt) for prompt, _ in some)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in some])
        with torch.no_grad():
            got = model.generate(
                ids.to(clock.torch_device), attention_mask=mask.to(clock.torch_device),
                max_new_tokens=max(n for _, n in some), do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
        assert got.shape[1] == width + max(n for _, n in some), "every row has its length"
    seconds = time.perf_counter() - begin
    new = sum(n for _, n in work)
    tokens = new + sum(len(prompt) for prompt, _ in work)
    return {
        "seconds": seconds, "requests": len(work), "tokens_per_s": tokens / seconds,
        "new_tokens_per_s": new / seconds,
    }  # fmt: skip


def transformers_row(shape: str, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Serve the workload with transformers' continuous batching, greedy, with its own settings."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    from benchmarks.engine_peers import continuous

    model, work = transformers_model(shape, options, clock)
    prompts, counts = [prompt for prompt, _ in work], [count for _, count in work]
    small = {"block_size": 16, "num_blocks": 64, "max_batch_tokens": 64, "use_cuda_graph": False}
    settings = ContinuousBatchingConfig(**({} if clock.cuda else small))
    config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
    done = continuous(model, config, settings, prompts, counts)
    tokens = sum(map(len, prompts)) + sum(counts)
    assert [len(x) for x in done.tokens] == counts, "every request has its length"
    return {
        "seconds": done.seconds, "requests": len(work), "tokens_per_s": tokens / done.seconds,
        "new_tokens_per_s": sum(counts) / done.seconds,
    }  # fmt: skip
