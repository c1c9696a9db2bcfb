"""Foreign models on the Triton target in the interpreter: experts, ALiBi, soft caps and windows.

And what its artefact tells of quantised weights.

TRITON_INTERPRET=1 pytest tests/nightly/test_interpreter_families.py     (minutes)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import pytest
import torch
import transformers

import aios_compile
from benchmarks.shapes import make

pytest.importorskip("triton")

SIZES = {
    "vocab_size": 67, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# name -> (model, its config, what differs from SIZES, kernels that it is here for)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any], tuple[str, ...]]] = {
    "mixtral": (
        transformers.MixtralForCausalLM, transformers.MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2}, ("topk", "expert_linear"),
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig,
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
        ("topk", "expert_linear", "rms_norm_rope_kv_write_paged_attention"),
    ),
    "gemma2": (
        transformers.Gemma2ForCausalLM, transformers.Gemma2Config,
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
        ("rope_kv_write_paged_attention", "rms_norm_linear"),
    ),
}  # fmt: skip


def bloom() -> Any:
    """Return a tiny BLOOM: attention with ALiBi, layer norms, biases."""
    config = transformers.BloomConfig(vocab_size=67, hidden_size=64, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config)


@pytest.mark.parametrize("name", [*FAMILIES, "bloom"])
def test_logits_are_those_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    kernels: tuple[str, ...] = ("kv_write_paged_attention",)
    if name == "bloom":
        model = bloom()
    else:
        made, config, more, kernels = FAMILIES[name]
        model = made(config(**{**SIZES, **more}))
    ids = [3, 5, 7, 9, 11, 13, 2, 40, 41, 42, 66]
    with torch.no_grad():
        want = model.eval()(torch.tensor([ids])).logits[0]
    sizes = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 8}
    with aios_compile.load_and_compile(
        model, device="interpreter", progress=False, **sizes
    ) as compiled:
        found = [kernel.name for kernel in compiled.program.kernels]
        assert all(any(x.startswith(kernel) for x in found) for kernel in kernels), found
        torch.testing.assert_close(compiled(ids), want, atol=2e-5, rtol=2e-5)


def test_the_artefact_tells_what_was_quantised(tmp_path: Path) -> None:
    sizes = {"max_model_len": 32, "max_num_seqs": 1, "max_num_batched_tokens": 1}
    with aios_compile.load_and_compile(
        make("micro", tmp_path), device="interpreter", quantization="int8", progress=False,
        cache_dir=str(tmp_path / "cache"), **sizes,
    ) as compiled:  # fmt: skip
        rows = json.loads((compiled.artefact_path / "quantization.json").read_text())
        notes = " ".join(compiled.report().notes)
    assert len(rows) == 3 and all(row["bits"] == 8.5 for row in rows), rows
    assert "3 matrices quantised to int8_g32_f16, 0 kept: 8.50 bits" in notes
