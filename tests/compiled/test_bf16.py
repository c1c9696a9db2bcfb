"""A bf16 checkpoint: no farther from float32 than transformers' own bf16.

Weights are upcast inside the kernels, which is exact. The KV cache holds bf16, and on a processor
with bf16 dot products linears round their activations (round_activations); nothing else is rounded.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from aios_compile.codegen.cpp import build
from aios_compile.codegen.packing import kind_of
from tests import zoo
from tests.compiled.conftest import Load
from tests.variants import nightly

NAMES = ("llama_gqa", "qwen3_gqa", *nightly("mistral_window", "qwen2_gqa"))


@pytest.mark.parametrize("name", NAMES)
def test_error_against_float32(name: str, load: Load, zoo_folder: Path) -> None:
    path = zoo.make(name, zoo_folder, "bfloat16")
    ids = zoo.token_ids(path)
    oracle = zoo.reference_logits(path, ids, "float32")  # the stored values, computed in float32
    theirs = (zoo.reference_logits(path, ids, "bfloat16") - oracle).abs()
    model = load(name, "bfloat16")
    packings = {kind_of(w.packed) for w in model.program.weights if w.packed}
    rounds = build.Target.host().bf16_dot
    assert packings == {"pairs16" if rounds else "rows16"}
    assert rounds == any("activations rounded to bf16" in n for n in model.report().notes)
    assert {state.dtype for state in model.program.states} == {"bf16"}
    ours = (model(ids) - oracle).abs()
    print(f"{name}: ours {ours.max():.2e} mean {ours.mean():.2e}, "
          f"theirs {theirs.max():.2e} mean {theirs.mean():.2e}")  # fmt: skip
    assert ours.max() <= theirs.max() and ours.mean() <= theirs.mean()


def test_float32_cache_leaves_nothing_rounded(load: Load, zoo_folder: Path) -> None:
    path = zoo.make("qwen3_gqa", zoo_folder, "bfloat16")
    ids = zoo.token_ids(path)
    model = load(
        "qwen3_gqa",
        "bfloat16",
        kv_cache_dtype="float32",
        disable_passes=("round_activations",),
    )
    oracle = zoo.reference_logits(path, ids, "float32")
    assert (model(ids) - oracle).abs().max() <= zoo.TOLERANCE
