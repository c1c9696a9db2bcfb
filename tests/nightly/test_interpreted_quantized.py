"""A tiny model with quantised weights as Triton kernels in the interpreter.

Int8 and int4 against eager are in tests/interpreted/test_whole_model.py.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

pytest.importorskip("triton")

import aios_compile
from tests import zoo
from tests.formats.gguf_files import convert
from tests.interpreted.harness import assert_close, batch, model


def test_steps_in_8_bit_floats_are_those_of_eager() -> None:
    """Activations are rounded on both sides; a tie that falls otherwise moves a logit a little."""
    built = model("qwen3_gqa", quantization="e4m3_g32_f32")
    assert any(e.packed == "planar.e4m3_g32_f32" for e in built.program.weights)
    ours, eager = built.executor(), built.eager()
    for number, sequences in enumerate(([(0, 5), (0, 2)], [(5, 1)])):
        given = batch(sequences, seed=number)
        assert_close(ours.step(given), eager.step(given), 2e-2)


@pytest.mark.parametrize("stored", ["int8", "int4", "Q4_0", "int8 pages", "fp8 pages"])
def test_both_targets_choose_the_same_tokens(stored: str, tmp_path: Path) -> None:
    """The CPU rounds activations to 8 bits: the most likely token may differ in near ties only."""
    path, options = zoo.make("qwen3_gqa", tmp_path), {"quantization": stored}
    if stored == "Q4_0":
        path, options = tmp_path / "model.gguf", {}
        convert(zoo.make("qwen3_gqa", tmp_path), path, lambda name: Kind[stored])
    if "pages" in stored:
        options = {"kv_cache_dtype": stored.split()[0]}
    sizes = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 8}
    results = []
    for device in ("cpu", "interpreter"):
        with aios_compile.load_and_compile(
            str(path), device=device, progress=False, num_threads=1, **options, **sizes
        ) as model:
            held = {e.dtype for e in model.program.states}
            in_codes = held == {"i8" if stored == "int8 pages" else "e4m3", "f32"}
            packed = any("." in e.packed for e in model.program.weights)
            assert in_codes if "pages" in stored else packed, "computes on codes"
            results.append(model([3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]))
    first, second = results
    assert (first - second).abs().max() < 0.15
    margin = first.topk(2).values.diff(dim=-1).abs().squeeze(-1)
    sure = margin > 0.3
    assert sure.sum() >= 3 and torch.equal(first.argmax(-1)[sure], second.argmax(-1)[sure])
