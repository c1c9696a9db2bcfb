"""What a device that is not there says, and how a card's memory is planned."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import aios_compile
from aios_compile.errors import ConfigError, DeviceMemoryError, EngineError
from aios_compile.runtime.gpu_executor import token_buckets
from aios_compile.runtime.gpu_memory import compare, needs, plan_card
from aios_compile.runtime.program_runner import state_page_bytes
from aios_compile.runtime.torch_device import InterpreterDevice, open_device
from tests.interpreted.harness import PAGES, batch, model


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused_before_the_model_is_opened() -> None:
    with pytest.raises(ConfigError, match=r"(?s)device='cuda': torch .* sees no GPU.*--target"):
        aios_compile.load_and_compile("no-such-model", device="cuda")


def test_the_interpreter_is_asked_for_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        open_device("interpreter")


def test_versions_that_fail_in_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen with triton 3.6.0 and numpy 2.4.6; 3.6.0 with numpy 2.3.5 runs."""
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(np, "__version__", "2.4.6")
    with pytest.raises(ConfigError, match=r"3\.6\.0's interpreter fails with NumPy 2\.4\.6"):
        open_device("interpreter")
    monkeypatch.setattr(np, "__version__", "2.3.5")
    assert open_device("interpreter").name == "cpu"


def test_buckets_pad_little_and_are_few() -> None:
    assert token_buckets(24) == (1, 2, 4, 8, 16, 24)
    buckets = token_buckets(8192)
    assert buckets[-1] == 8192 and len(buckets) < 80
    for tokens in range(65, 8193):
        padded = next(b for b in buckets if b >= tokens)
        assert padded <= tokens * 1.13


def test_pages_are_what_a_card_has_left() -> None:
    """On cards of made-up sizes."""
    built = model("qwen3_gqa")
    program, limits, buckets = built.program, built.limits, (1, 2, 4, 8)
    page = sum(state_page_bytes(program))
    limits = dataclasses.replace(limits, max_num_seqs=4096)
    rest = sum(need.num_bytes for need in needs(program, limits, buckets))
    total = 2 * (rest + 100 * page)
    half = plan_card(program, limits, buckets, total, total, 0.5)
    assert half.num_pages == 100 and half.num_bytes <= half.budget_bytes == total // 2
    assert plan_card(program, limits, buckets, total, rest + 9 * page, 0.9).num_pages == 9
    assert plan_card(program, limits, buckets, total, total, 0.5, wanted_pages=40).num_pages == 40
    most = limits.max_num_seqs * limits.max_pages_per_sequence + 1
    assert plan_card(program, limits, buckets, 1 << 40, 1 << 40, 0.9).num_pages == most


@pytest.mark.parametrize(("pages", "wanted"), [(8, None), (39, 40), (-3, None)])
def test_memory_that_will_not_do_is_predicted_with_a_table(pages: int, wanted: int | None) -> None:
    built = model("qwen3_gqa")
    program, limits, buckets = built.program, built.limits, (1, 2, 4, 8)
    every = needs(program, limits, buckets)
    page = sum(state_page_bytes(program))
    card = sum(need.num_bytes for need in every) + pages * page
    with pytest.raises(DeviceMemoryError, match="expected at least") as caught:
        plan_card(program, limits, buckets, card, card, 1.0, wanted)
    text = str(caught.value)
    assert f"leaves room for {max(0, pages)} KV pages" in text and "try: raise" in text
    for need in every:
        assert f"  {need.name:<12} {need.num_bytes / 1e6:>10,.1f} MB" in text
    assert "KV cache" in text and "tokens; largest: " in text
    card += 4 * page  # the needs of all but pages, and one page
    assert plan_card(program, limits, buckets, card, card, 1.0, 1).num_pages == 1


class Counting(InterpreterDevice):
    """Adds up what is allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = 0

    def allocate(self, num_bytes: int) -> Any:
        self.allocated += num_bytes
        return super().allocate(num_bytes)


@pytest.mark.parametrize("form", [None, "int8"])
def test_an_executor_allocates_what_was_planned_and_a_step_nothing(form: str | None) -> None:
    """Rows of codes are longer on a card than in their format."""
    built = model("qwen3_gqa", quantization=form)
    device = Counting()
    executor = built.executor(device)
    plan = plan_card(built.program, built.limits, executor.buckets, 4 << 30, 4 << 30, 1.0, PAGES)
    planned = sum(n.num_bytes for n in plan.needs if n.name not in ("graphs", "driver"))
    planned += plan.num_bytes - sum(n.num_bytes for n in plan.needs)
    slack = 256 * len(built.program.states)  # what aligning the pools may take
    assert planned - slack <= device.allocated <= planned
    before = device.allocated
    executor.step(batch([(0, 3)]))
    assert device.allocated == before
    for taken, fits in ((plan.num_bytes, True), (plan.num_bytes + 1, False)):
        line, found = compare(plan, 4 << 30, (4 << 30) - taken)
        assert found == fits and "GPU memory taken" in line


def test_a_step_beyond_the_plan_is_refused() -> None:
    built = model("qwen3_gqa")
    executor = built.executor(captures=False)
    with pytest.raises(EngineError, match="a step of 9 tokens, planned for at most 8"):
        executor.step(batch([(0, 9)]))
    limits = dataclasses.replace(built.limits, max_num_seqs=1)
    executor.limits = limits
    with pytest.raises(EngineError, match="a step of 2 sequences, planned for at most 1"):
        executor.step(batch([(0, 1), (0, 1)]))
