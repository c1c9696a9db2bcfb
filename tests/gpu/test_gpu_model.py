"""Whole models on a GPU: graphs against eager, the engine, nothing compiled after ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import aios_compile
from aios_compile.runtime.torch_device import CudaDevice
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
    kernels = {
        id(launch["kernel"]): launch["kernel"]
        for module in modules
        for variant in module.VARIANTS
        for launch in variant["launches"]
    }
    return sum(
        len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values()
    )


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
def test_captured_steps_are_those_of_eager(name: str, dtype: str, tolerance: float) -> None:
    built = model(name, dtype, tokens=24)
    ours, eager = built.executor(CudaDevice("cuda")), built.eager()
    ours.capture()
    compiled = num_binaries(ours.modules)
    for number, sequences in enumerate(STEPS):
        given = batch(sequences, seed=number)
        assert_close(ours.step(given), eager.step(given), tolerance)
    assert compiled and num_binaries(ours.modules) == compiled, "nothing compiles after ready"


def test_a_graph_replays_on_other_batches() -> None:
    built = model("qwen3_gqa")
    check_replay(built.executor(CudaDevice("cuda")), built)


@pytest.mark.parametrize("name", ["qwen3_gqa", "llama_tied"])
def test_the_engine_gives_the_tokens_of_the_cpu(name: str, tmp_path: Path) -> None:
    path = str(zoo.make(name, tmp_path))
    prompts = [[3, 5, 7, 9, 11, 13], [1, 2], [50]]
    tokens = []
    for device in ("cpu", "cuda"):
        with aios_compile.load_and_compile(
            path, device=device, progress=False, max_model_len=64, max_num_seqs=4
        ) as loaded:
            done = loaded.generate(prompts, max_tokens=12, ignore_eos=True, temperature=0)
            tokens.append([r.outputs[0].token_ids for r in done])
    assert tokens[0] == tokens[1]
