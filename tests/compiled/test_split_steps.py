"""Steps of sequences that decode, a part for each worker: bits are those of a step as a whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aios_compile.codegen.cpp import build
from aios_compile.compiled_model import CompiledModel
from aios_compile.runtime.split_step import LEAST_TOKENS
from tests.compiled.conftest import Load
from tests.compiled.invariance import facts

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "logprobs": 4},
    {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.9, "min_p": 0.05, "logit_bias": {5: 2.0, 9: -4.0}},
    {"temperature": 1.0, "allowed_token_ids": [3, 8, 21, 40], "logprobs": 2},
]
PROMPTS = [[2 + i, 7, 11 + 3 * i, 4][: 1 + i % 4] for i in range(15)]
SIZES = {"max_num_seqs": 16, "max_num_batched_tokens": 32}


def told(model: CompiledModel) -> list[Any]:
    defaults = model.sampling_defaults
    params = [
        defaults.params(max_tokens=6 + i % 7, seed=i, ignore_eos=True, **KINDS[i % len(KINDS)])
        for i in range(len(PROMPTS))
    ]
    outputs = model.generate(PROMPTS, params)
    texts = [facts(o) if o.outputs[0].logprobs else o.outputs[0].token_ids for o in outputs]
    return texts


@pytest.mark.parametrize(("overlap", "threads"), [("0", 2), ("2", 3)])
def test_bits_do_not_depend_on_it(
    overlap: str, threads: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sampling parameters, lists of tokens among them; batches of 15 down to a few."""
    monkeypatch.setenv("AIOS_OVERLAP", overlap)
    found, counts = [], []
    for splits in "01":
        monkeypatch.setenv("AIOS_SPLIT_STEPS", splits)
        model = load("qwen3_gqa", num_threads=threads, **SIZES)
        found.append(told(model))
        assert model.runner is not None
        counts.append(model.runner.num_split_steps)
    assert found[0] == found[1]
    assert counts[0] == 0 and counts[1] >= 6, counts


def test_only_rows_in_order_are_split(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in another order belong to other tokens than their part's; few tokens stay together."""
    monkeypatch.setenv("AIOS_OVERLAP", "0")
    model = load("qwen3_gqa", num_threads=2, **SIZES)
    runner, executor = model.runner, model.engine._core.executor
    assert runner is not None
    step, seen = executor.step, []

    def look(batch: Any) -> Any:
        result = step(batch)
        if batch.num_tokens == batch.num_sequences == 2 * LEAST_TOKENS and not seen:
            before = runner.num_split_steps
            plain = result.logits.copy()
            turned = replace(batch, logit_rows=batch.logit_rows[::-1].copy())
            seen.append((before, np.array_equal(step(turned).logits, plain[::-1])))
            assert runner.num_split_steps == before
            assert np.array_equal(step(batch).logits, plain)
        return result

    monkeypatch.setattr(executor, "step", look)
    prompts = PROMPTS[: 2 * LEAST_TOKENS]
    model.generate(prompts, max_tokens=4, ignore_eos=True)
    assert seen and seen[0][0] > 0 and seen[0][1]
    before = runner.num_split_steps
    model.generate(prompts[:-1], max_tokens=3, ignore_eos=True)
    assert runner.num_split_steps == before


def test_weights_beyond_the_cache_are_read_by_all_workers_together(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cache_bytes", lambda level: 4096)
    model = load("qwen3_gqa", num_threads=2, **SIZES)
    model.generate(PROMPTS[:8], max_tokens=3, ignore_eos=True)
    assert model.runner is not None and model.runner.num_split_steps == 0
