"""Whole models on a GPU: graphs against eager, the engine, nothing compiled after ready."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import aios_compile
from aios_compile.codegen.triton import binary_cache, compile_ahead
from aios_compile.codegen.triton.binary_cache import every_launch
from aios_compile.compiler import launched_sources
from aios_compile.runtime.cuda_device import CudaDevice
from aios_compile.runtime.torch_device import card_name
from tests import zoo
from tests.interpreted.harness import assert_close, batch, model
from tests.interpreted.test_graph_faults import check_replay

STEPS = (
    [(0, 10), (0, 7)],
    [(10, 1), (7, 9), (0, 3)],
    [(11, 1), (16, 1), (3, 1)],
    [(12, 1), (17, 1), (4, 1), (0, 1)],
    [(18, 1)],
)


def num_binaries(modules: Any) -> int:
    """Return how many binaries Triton holds for the kernels of modules."""
    launches = [known.launch for module in modules for known in every_launch(module)]
    kernels = {id(launch["kernel"]): launch["kernel"] for launch in launches}
    return sum(
        len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values()
    )


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """Return a function from a model to a device that has its kernels, compiled side by side."""

    def device_for(built: Any) -> CudaDevice:
        sources, card = launched_sources(built.program, built.emitted), card_name("cuda")
        compile_ahead.compile_ahead(sources, card, tmp_path / "made", os.cpu_count() or 1)
        for name, data in binary_cache.keep(tmp_path / "made" / compile_ahead.CACHE):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        device = CudaDevice("cuda")
        device.use_binaries(tmp_path)
        return device

    return device_for


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("qwen3_gqa", "float32", 1e-4),
        ("qwen3_gqa", "bfloat16", 3e-2),
        ("mistral_window", "float16", 5e-3),
        ("llama_odd_sizes", "float32", 1e-4),
        ("qwen2_layer_types", "float32", 1e-4),
    ],
)
def test_captured_steps_are_those_of_eager(
    name: str, dtype: str, tolerance: float, opened: Any
) -> None:
    built = model(name, dtype, tokens=24)
    ours, eager = built.executor(opened(built)), built.eager()
    ours.capture()
    compiled = num_binaries(ours.modules)
    for number, sequences in enumerate(STEPS):
        given = batch(sequences, seed=number)
        assert_close(ours.step(given), eager.step(given), tolerance)
    assert compiled and num_binaries(ours.modules) == compiled, "nothing compiles after ready"


def test_a_graph_replays_on_other_batches(opened: Any) -> None:
    built = model("qwen3_gqa")
    check_replay(built.executor(opened(built)), built)


def test_steps_begun_ahead_are_those_of_eager(opened: Any) -> None:
    """Ids go from step to step on the device; a mark is passed once its step was waited for."""
    built = model("qwen3_gqa", "float32", tokens=24)
    ours, eager = built.executor(opened(built)), built.eager()
    ours.capture()
    steps = [batch([(done, 1), (done + 2, 1)]) for done in range(5, 25)]
    given = batch([(0, 5), (0, 7)])
    running = ours.begin(given)
    for following in steps:
        behind = ours.begin(following, np.arange(2))
        got, theirs = running.wait(), eager.step(given)
        assert list(got.sampled_ids) == list(theirs.sampled_ids) and running.has_ended
        np.testing.assert_allclose(got.logprobs, theirs.logprobs, atol=1e-4)
        assert 0 < running.micros < 1e6
        given, running = following, behind
        given.token_ids = np.array(theirs.sampled_ids)
    running.wait()


def test_pages_come_back_from_pinned_memory(opened: Any) -> None:
    built = model("qwen3_gqa")
    executor = built.executor(opened(built), num_host_pages=3)
    executor.step(batch([(0, 5)]))
    before = executor.state_bytes()
    executor.swap_out([(1, 2)])
    executor.copy_pages([(9, 1)])
    assert (executor.state_bytes() != before).any()
    executor.swap_in([(2, 1)])
    assert (executor.state_bytes() == before).all()


@pytest.mark.parametrize("overlap", ["0", "1", "2"])
@pytest.mark.parametrize("name", ["qwen3_gqa", "llama_tied"])
def test_the_engine_gives_the_tokens_of_the_cpu(
    name: str,
    overlap: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With steps begun ahead and without; and the card's memory is what was planned."""
    caplog.set_level("WARNING")
    monkeypatch.setenv("AIOS_OVERLAP", overlap)
    path = str(zoo.make(name, tmp_path))
    prompts = [[3, 5, 7, 9, 11, 13], [1, 2], [50]]
    tokens = []
    for device in ("cpu", "cuda"):
        with aios_compile.load_and_compile(
            path, device=device, progress=False, max_model_len=64, max_num_seqs=4
        ) as loaded:
            done = loaded.generate(prompts, max_tokens=12, ignore_eos=True, temperature=0)
            tokens.append([r.outputs[0].token_ids for r in done])
            if device == "cuda":
                assert bool(loaded.engine.stats.num_steps_ahead) == (overlap != "0")
    assert tokens[0] == tokens[1]
    assert "GPU memory taken" not in caplog.text, "more was taken than planned"


def test_the_clock_chooses_and_no_token_changes(tmp_path: Path, monkeypatch: Any) -> None:
    """A first start times candidates; what it chose gives the tokens of the standard kernels."""
    path, found = str(zoo.make("qwen3_gqa", tmp_path, "bfloat16")), []
    for seconds in ("0", "20"):
        monkeypatch.setenv("AIOS_SELECT_KERNELS", seconds)
        for _ in range(2):  # the second time from the artefact
            with aios_compile.load_and_compile(
                path, device="cuda", progress=False, max_model_len=64, max_num_seqs=4
            ) as loaded:
                done = loaded.generate(
                    [[3, 5, 7], [50]], max_tokens=12, ignore_eos=True, temperature=0
                )
                notes = [n for n in loaded.report().notes if n.startswith("select_kernels: ")]
                executor: Any = loaded.engine.executor
                assert executor.num_late_compilations == 0
                found.append([r.outputs[0].token_ids for r in done])
        assert bool(notes) == (seconds != "0")
    assert found == [found[0]] * 4 and any("trials in" in note for note in notes)
