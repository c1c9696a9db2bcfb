"""A captured step replays on other batches; each planted fault of graph capture is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from aios_compile.codegen.triton import kv_write_attention
from aios_compile.errors import EngineError
from aios_compile.runtime.batch import Batch
from aios_compile.runtime.gpu_executor import GpuExecutor
from aios_compile.runtime.torch_device import RecordedGraph
from tests.interpreted.harness import PAGES, Model, assert_close, batch, model
from tests.interpreted.strict_device import StrictDevice


def check_replay(executor: GpuExecutor, built: Model, poisons: bool = False) -> None:
    """Capture with one batch, replay with others of the same bucket; compare results and pages.

    poisons: fill what an earlier step left of the inputs with ones before each step.
    """
    eager = built.eager()
    steps = (
        batch([(0, 4)]),  # one sequence of four tokens
        batch([(0, 1)] * 4, seed=1),  # four of one
        batch([(0, 1)] * 3, first_page=13, seed=2),  # three, one on a page that was another's
    )
    for given in steps:
        for memory in (executor.staging.memory, executor.staging.packet) if poisons else ():
            memory.fill_(255)
        assert_close(executor.step(given), eager.step(given), 1e-5)
    assert set(executor.graphs) == {4}
    for name, ours in zip(built.module.states, pages(executor, built)):
        theirs = eager._values[name].numpy()
        np.testing.assert_allclose(ours[1:], theirs[1:], atol=1e-5, err_msg=name)  # 0 is trash


def pages(executor: GpuExecutor, built: Model) -> list[Any]:
    """Return the KV pages of each layer."""
    flat, found = executor.state_bytes(), []
    for entry, begin in zip(built.program.states, executor._state_offsets):
        size = 4 * int(np.prod(entry.page_shape)) * PAGES
        cache = flat[begin : begin + size].view(np.float32)
        found.append(cache.reshape(PAGES, *entry.page_shape))
    return found


def test_a_graph_replays_on_other_batches() -> None:
    built = model("qwen3_gqa")
    check_replay(built.executor(StrictDevice()), built, poisons=True)


class ReadsBack:
    """A module whose host code looks at a device value."""

    def __init__(self, module: Any) -> None:
        self.TYPES, self.module = module.TYPES, module

    def launch(self, operands: Any, **sizes: int) -> None:
        assert operands[1][0].item() >= 0
        self.module.launch(operands, **sizes)


class FrozenLength(GpuExecutor):
    """Captures with the number of sequences of the batch at hand."""

    def step(self, batch: Batch) -> Any:
        self.now = batch.num_sequences
        return super().step(batch)

    def sizes_of(self, bucket: int) -> dict[str, int]:
        return {**super().sizes_of(bucket), "S": self.now}


class MovedBuffer(GpuExecutor):
    """Puts the inputs of each step into memory of their own."""

    def step(self, batch: Batch) -> Any:
        self.staging._place()
        return super().step(batch)


class StalePadding(GpuExecutor):
    """Leaves the last batch's tokens behind the end of a shorter one."""

    def __init__(self, program: Any, modules: Any, *others: Any) -> None:
        index = next(i for i, k in enumerate(program.kernels) if k.name == "prepare_step")
        path = Path(modules[index].__file__)
        text = path.read_text()
        stale = path.with_name("stale.py")
        stale.write_text(text.replace("mask=t < T", "mask=inside"))
        assert text != stale.read_text()
        super().__init__(program, modules, *others)
        self.modules = [*modules]
        self.modules[index] = self.device.load(stale)


@pytest.mark.parametrize("faulty", [FrozenLength, MovedBuffer, StalePadding])
def test_planted_faults_of_executors_are_found(
    faulty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = model("qwen3_gqa")
    if faulty is StalePadding:  # at decode no program owns padding: it writes none of its keys
        monkeypatch.setattr(kv_write_attention, "NEW_TOKENS", 0)
        built = model.__wrapped__("qwen3_gqa")
    device = StrictDevice()
    modules = [device.load(path) for path in built.paths]
    executor = faulty(built.program, modules, built.weights, built.limits, device)
    with pytest.raises(AssertionError):
        check_replay(executor, built)


def test_a_value_read_back_is_found() -> None:
    built = model("qwen3_gqa")
    executor = built.executor(StrictDevice())
    index = next(i for i, k in enumerate(built.program.kernels) if k.name.startswith("embedding"))
    executor.modules[index] = ReadsBack(executor.modules[index])
    with pytest.raises(EngineError, match="waits for the device while a graph is captured"):
        executor.step(batch([(0, 1)]))


def test_lists_that_grow_move_the_inputs_and_drop_the_graphs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A step that finds no graph is counted, and told."""
    built = model("qwen3_gqa")
    executor = built.executor()
    given = batch([(0, 1)])
    executor.graphs[1] = before = RecordedGraph()
    given.allowed_ids = np.arange(3000) % 128
    given.allowed_starts = np.array([0, 3000])
    executor.step(given)
    assert executor.graphs[1] is not before
    assert executor.staging.lists == {"penalty": 1024, "bias": 1024, "allowed": 4096}
    assert executor.num_late_captures == 1
    assert "no graph of 1 tokens was captured before" in caplog.text
