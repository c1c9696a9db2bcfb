"""Every kernel of planned models, plain and quantised, compiled for four targets: no spills.

Registers and shared memory are pinned in model_resources.txt; of a quantised layer those of its
linears, the others being the same. Decode kernels that stream weights or pages do so 16 bytes at a
time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from aios_compile.codegen.triton import expert_linear, topk
from aios_compile.codegen.triton.cards import CARDS
from aios_compile.codegen.triton.compile_ahead import compile_ahead
from aios_compile.errors import CodegenError
from aios_compile.study import gpu_compile
from aios_compile.study.kernel_table import kernel_rows
from tests.codegen import test_expert_linear as experts
from tests.codegen.kernels import operands_of, trace
from tests.codegen.test_triton_compiled import QWEN3
from tests.codegen.triton_kernels import load
from tests.nightly.resources import DIGEST, hold

LLAMA_8B = {
    **QWEN3, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
WIDE = ("v4.b32", "cp.async.cg.shared.global", "global_load_dwordx4")  # 16 bytes


PINNED = Path(__file__).parent / "model_resources.txt"


def sources_of(
    config: Any, target: str, folder: Path, quantization: str | None = None, kv: str = "auto"
) -> list[Any]:
    """Return the kernels of a layer, and of a model that is not quantised all of them."""
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    options: dict[str, Any] = {"max_model_len": 4096, "kv_cache_dtype": kv}
    options |= {"quantization": quantization} if quantization else {}
    planned = gpu_compile.plan_for(folder, target, options)
    layer = planned.program.function("layer")
    used = dict.fromkeys(item.kernel for item in layer.items)
    every = planned.emitted.sources
    return [every[i] for i in used] if quantization else list(every)


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("config", [QWEN3, LLAMA_8B], ids=["qwen3", "llama"])
def test_kernels_of_a_model(
    config: Any, quantization: str | None, target: str, tmp_path: Path
) -> None:
    if quantization == "fp8" and not CARDS[target].fp8:
        with pytest.raises(CodegenError, match=f"{target} .* does not multiply e4m3"):
            sources_of(config, target, tmp_path, quantization)
        return
    sources = sources_of(config, target, tmp_path, quantization)
    for source, binaries in zip(sources, compile_ahead(sources, target, tmp_path)):
        # sine and cosine keep a table for large angles in local memory, which counts as spills
        known = "tl.cos(" in source.text
        assert known or all(b.spill_bytes == 0 for b in binaries), binaries
        if "linear" in source.name or "attention" in source.name:
            for binary in binaries[: 3 if quantization else 1]:
                assert any(x in binary.assembly() for x in WIDE), binary
        if quantization is None or "linear" in source.name:
            model = config["architectures"][0] + (f" {quantization}" if quantization else "")
            hold(PINNED, f"{target} {model} {title(source)}", binaries)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("config", [QWEN3, LLAMA_8B], ids=["qwen3", "llama"])
def test_quantised_decode_is_five_launches_and_its_floor(
    config: Any, quantization: str, tmp_path: Path
) -> None:
    """As of float weights in codegen/test_triton_compiled.py."""
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    options = {"max_model_len": 4096, "quantization": quantization}
    planned = gpu_compile.plan_for(tmp_path, "cuda:90", options)
    rows = kernel_rows(planned.module, planned.emitted, planned.program)
    floor = sum(row.weight_bytes + row.kv_bytes for row in rows)
    assert sum(row.bytes_a_token for row in rows) <= 1.02 * floor  # the goal is 1.05
    items = planned.program.function("layer").items
    modules = [load(planned.emitted.sources[item.kernel]) for item in items]
    for tokens in (1, 2, 16, 32):
        chosen = [
            next(v for v in module.VARIANTS if v["most"] is None or tokens <= v["most"])
            for module in modules
        ]
        assert sum(len(variant["launches"]) for variant in chosen) == 5


def title(source: Any) -> str:
    """Return a kernel's name without the digest of its text; equal names differ by their size."""
    return f"{DIGEST.sub('', source.name)} {source.text.partition(chr(10))[0].lstrip('# ')[:60]}"


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_attention_over_pages_of_codes(kv: str, target: str, tmp_path: Path) -> None:
    """Codes are read in wide loads on each card, e4m3 converted by those that have it."""
    for source in sources_of(QWEN3, target, tmp_path, kv=kv):
        if "attention" not in source.name:
            continue
        (binaries,) = compile_ahead([source], target, tmp_path)
        assert all(b.spill_bytes == 0 for b in binaries), binaries
        converts = ["e4m3" in b.assembly() for b in binaries]
        assert all(converts) == any(converts) == (kv == "fp8" and CARDS[target].fp8)
        hold(PINNED, f"{target} {kv}_pages", binaries)


@pytest.mark.parametrize("target", CARDS)
def test_experts_and_their_choice(target: str, tmp_path: Path) -> None:
    """Qwen3-30B-A3B: 128 experts of 768 inner features, eight a token."""
    inputs = [(("T", 2048), torch.float32), ((128, 1536, 2048), torch.bfloat16)]
    body = trace(experts.product(False), *inputs, (("T", 8), torch.int64))
    router = trace(lambda x: tuple(torch.topk(x, 8)), (("T", 128), torch.float32))
    made = [(expert_linear, body), (topk, router)]
    sources = [e.emit(e.spec_of(b, operands_of(b))) for e, b in made]  # type: ignore[attr-defined]
    for source, binaries in zip(sources, compile_ahead(sources, target, tmp_path)):
        assert all(b.spill_bytes == 0 for b in binaries), (source.name, binaries)
    if "cuda" in target:
        assert (
            "cp.async.cg.shared.global"
            in compile_ahead(sources[:1], target, tmp_path)[0][0].assembly()
        )
