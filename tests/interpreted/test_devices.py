"""What a device that is not there says, and how a card's memory is planned."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import aios_compile
from aios_compile.errors import ConfigError, EngineError
from aios_compile.runtime.gpu_executor import token_buckets
from aios_compile.runtime.gpu_memory import kv_pages, needs
from aios_compile.runtime.program_runner import state_page_bytes
from tests.interpreted.harness import batch, model


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused_before_the_model_is_opened() -> None:
    with pytest.raises(ConfigError, match=r"(?s)device='cuda': torch .* sees no GPU.*--target"):
        aios_compile.load_and_compile("no-such-model", device="cuda")


def test_the_interpreter_is_asked_for_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from aios_compile.runtime.torch_device import open_device

    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        open_device("interpreter")


def test_buckets_pad_little_and_are_few() -> None:
    assert token_buckets(24) == (1, 2, 4, 8, 16, 24)
    buckets = token_buckets(8192)
    assert buckets[-1] == 8192 and len(buckets) < 80
    for tokens in range(65, 8193):
        padded = next(b for b in buckets if b >= tokens)
        assert padded <= tokens * 1.13


def test_pages_are_what_a_card_has_left() -> None:
    program = model("qwen3_gqa").program
    page, rest = sum(state_page_bytes(program)), sum(needs(program).values())
    total = 4 << 30
    assert kv_pages(program, total, total, 0.5) == (total // 2 - rest) // page
    assert kv_pages(program, total, rest + 7 * page, 0.9) == 7
    with pytest.raises(ConfigError, match=r"does not fit: .* weights 0 MB, arena .* graphs"):
        kv_pages(program, rest, rest, 1.0)


def test_a_step_beyond_the_plan_is_refused() -> None:
    built = model("qwen3_gqa")
    executor = built.executor(captures=False)
    with pytest.raises(EngineError, match="a step of 9 tokens, planned for at most 8"):
        executor.step(batch([(0, 9)]))
    limits = dataclasses.replace(built.limits, max_num_seqs=1)
    executor.limits = limits
    with pytest.raises(EngineError, match="a step of 2 sequences, planned for at most 1"):
        executor.step(batch([(0, 1), (0, 1)]))
