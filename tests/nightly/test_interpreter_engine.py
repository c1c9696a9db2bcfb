"""The whole engine on the Triton target in the interpreter: the tokens of the C++ target.

TRITON_INTERPRET=1 pytest tests/nightly/test_interpreter_engine.py     (minutes)
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import pytest

import aios_compile
from tests import zoo

pytest.importorskip("triton")

FIELDS = (
    {"temperature": 0},
    {"temperature": 0.9, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 5, "top_k": 9, "min_p": 0.02, "logit_bias": {4: 3.0}},
)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("qwen3_gqa", "bfloat16", 2e-2), ("mistral_window", "float16", 4e-3)],
)
def test_steps_in_half_precision_are_those_of_eager(
    name: str, dtype: str, tolerance: float
) -> None:
    from tests.interpreted.harness import model
    from tests.interpreted.test_whole_model import check

    check(model(name, dtype), tolerance)


@pytest.mark.parametrize(
    "name", ["qwen3_gqa", "llama_gqa", "mistral_window", "qwen2_layer_types", "llama_odd_sizes"]
)
def test_both_targets_give_the_same_tokens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of different lengths, cut into chunks of the step's eight tokens, then decodes; steps
    one after the other, and begun ahead.
    """
    path = str(zoo.make(name, tmp_path))
    sizes = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 8}
    prompts = [[3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23], [1, 2], [50]]
    results = []
    for device, overlap in (("cpu", "0"), ("interpreter", "0"), ("interpreter", "2")):
        if overlap == "2" and name != "qwen3_gqa":
            continue
        monkeypatch.setenv("AIOS_OVERLAP", overlap)
        with aios_compile.load_and_compile(
            path, device=device, progress=False, num_threads=1, **sizes
        ) as model:
            logits = model(prompts[0])
            tokens = []
            for fields in FIELDS:
                done = model.generate(prompts, max_tokens=4, ignore_eos=True, **fields)
                tokens.append([r.outputs[0].token_ids for r in done])
            results.append((logits, tokens))
            assert bool(model.engine.stats.num_steps_ahead) == (overlap == "2")
    for logits, tokens in results[1:]:
        assert (results[0][0] - logits).abs().max() < 1e-4
        assert results[0][1] == tokens
