"""Pinned hits of the rewriting and fusing passes on captured models; level 3 against level 1."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule, Level, is_kernel_call
from aios_compile.ir.refresh import refresh
from aios_compile.ir.verifier import verify
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.pipeline import FUSE, RAISE, REWRITE
from tests.passes import helpers, level2
from tests.variants import nightly

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 9},
}
HITS = {
    "page_attention": (1, 0),
    "gather_last_tokens": (0, 1),
    "sample_tokens": (0, 1),
    "merge_qkv": (1, 0),
    "merge_gate_up": (1, 0),
    "fuse_qk_norm_rope_kv_write": (1, 0),
    "fuse_add_rms_norm": (1, 0),
    "fuse_linear_epilogue": (2, 1),  # gated activation, MLP residual; cast of the embedding
    "fuse_pointwise": (0, 2),  # rotary tables; the final norm of gathered rows
    "form_kernels": (4, 2),
}
LAYER = [
    *("row_reduction", "linear", "qk_norm_rope_kv_write", "paged_attention", "linear"),
    *("row_reduction", "linear", "linear"),
]
ON_TRITON = {  # five kernels a layer
    **HITS,
    "fuse_kv_write_into_attention": (1, 0),
    "fuse_qk_norm_rope_kv_write": (0, 0),
    "fuse_norm_into_linear": (2, 0),
    "fuse_add_rms_norm": (0, 0),
    "fuse_linear_epilogue": (2, 1),  # both residuals; cast of the embedding
    "form_kernels": (0, 2),
}
TRITON_LAYER = ["linear", "kv_write_attention", "linear", "linear", "linear"]
IDS = list(range(3, 43))
CODES = {"int8": (torch.int8, 0.02), "e4m3": (torch.float8_e4m3fn, 0.1)}  # most that they change


def lowered(
    module: IRModule, target: str = "cpp", options: PassOptions | None = None
) -> dict[str, tuple[int, int]]:
    """Take a program to level 3, verifying after each pass; return (layer, outer) hits a pass."""
    hits = {}
    for stage in (RAISE, REWRITE, FUSE):
        for function in [p for p in stage.passes if info_of(p).target in ("", target)]:
            applied = helpers.apply(function, module, target, options).hits
            if any(applied.values()):
                refresh(module)
                verify(module)
            layers = [n for name, n in applied.items() if name]
            hits[function.__name__] = (max(layers, default=0), applied[""])
        module.level = stage.level_after
    verify(module)
    return hits


def kinds(module: IRModule, region: str) -> list[str]:
    nodes = module.graphs()[region].graph.nodes
    return [n.meta["kernel"] for n in nodes if is_kernel_call(n)]


def paged_logits(module: IRModule, *, codes: str = "") -> torch.Tensor:
    """Run a sequence in chunks through permuted pages. codes: caches hold rounded codes."""
    caches = level2.empty_caches(module)
    if codes:
        kind = CODES[codes][0]
        caches |= {n: c.mul(0).to(kind) for n, c in caches.items() if n.endswith(f"_{codes}")}
    cuts = (0, 17, 18, 40)
    parts = [
        level2.step(module, [(IDS[a:b], a, [9, 2, 5])], caches)["logits"]
        for a, b in itertools.pairwise(cuts)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("target", ["cpp", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hits_are_pinned_and_level_3_computes_what_was_captured(family: str, target: str) -> None:
    module = helpers.captured(family, torch.bfloat16, **FAMILIES[family])
    values = {"token_ids": torch.tensor(IDS), "positions": torch.arange(len(IDS))}
    (want,) = helpers.evaluate(module, values, len(IDS))
    hits = lowered(module, target)
    wanted = HITS if target == "cpp" else ON_TRITON
    assert {name: hits[name] for name in wanted} == wanted
    assert module.level is Level.KERNELS
    assert kinds(module, "layer") == (LAYER if target == "cpp" else TRITON_LAYER)
    helpers.assert_same([want], [paged_logits(module)])


@functools.cache
def windowed() -> IRModule:
    return helpers.captured("mistral", torch.bfloat16, sliding_window=9)


@pytest.mark.parametrize("codes", CODES)
def test_a_cache_of_codes_changes_no_other_pass(codes: str) -> None:
    """The same hits and kernels; logits within what half a step of the codes can make of them."""
    module = snapshot.take(windowed())
    values = {"token_ids": torch.tensor(IDS), "positions": torch.arange(len(IDS))}
    (want,) = helpers.evaluate(module, values, len(IDS))
    hits = lowered(module, options=PassOptions(quantize_kv=codes))
    assert {name: hits[name] for name in HITS} == HITS and hits["quantize_kv"] == (1, 0)
    assert kinds(module, "layer") == LAYER
    names = [name.removeprefix("layer_") for name in module.states]
    states = (f"k_cache_{codes}", "k_scales", f"v_cache_{codes}", "v_scales")
    assert sorted(names) == [f"{i}_{n}" for i in (0, 1) for n in states]
    helpers.assert_same([want], [paged_logits(module)])
    lost = (paged_logits(module, codes=codes) - want).abs().max() / want.abs().max()
    assert 1e-5 < lost < CODES[codes][1], lost


def foreign(name: str) -> Any:
    """Return a tiny transformers model of a family that no pass was written for."""
    import transformers

    sizes = {"vocab_size": 67, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    if name == "gemma2":
        more = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
        config = transformers.Gemma2Config(**sizes, **more, query_pre_attn_scalar=16)
        return transformers.Gemma2ForCausalLM(config)
    if name == "neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))
    config = transformers.CohereConfig(**sizes, num_key_value_heads=2, use_qk_norm=True)
    return transformers.CohereForCausalLM(config)


@functools.cache
def _captured_foreign(name: str) -> IRModule:
    torch.manual_seed(0)
    return helpers.captured_module(foreign(name), flat=False)


def captured_foreign(name: str) -> IRModule:
    """Return level 1 of such a model, captured once a process: a copy each call."""
    return snapshot.take(_captured_foreign(name))


FOREIGN = {
    "gemma2": {"fuse_add_rms_norm": (2, 0), "fuse_linear_epilogue": (1, 2), "merge_qkv": (1, 0)},
    "neox": {"fuse_qk_norm_rope_kv_write": (1, 0), "fuse_pointwise": (1, 2)},
    "cohere": {"merge_qkv": (1, 0), "merge_gate_up": (1, 0), "fuse_linear_epilogue": (2, 1)},
}


@pytest.mark.parametrize("name", ["neox", "cohere", *nightly("gemma2")])
def test_foreign_modules_reach_level_3(name: str) -> None:
    module = captured_foreign(name)
    values = {"token_ids": torch.tensor(IDS), "positions": torch.arange(len(IDS))}
    (want,) = helpers.evaluate(module, values, len(IDS))
    hits = lowered(module)
    assert {name: hits[name] for name in FOREIGN[name]} == FOREIGN[name]
    helpers.assert_same([want], [paged_logits(module)])


class Unrolled(level2.Model):
    """Two layers that are no ModuleList: no region is found, all is one graph."""

    def __init__(self) -> None:
        super().__init__(2, qk_norm=True, bias=True, window=None)
        self.first, self.second = self.layers
        del self.layers

    def run_layers(self, x: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, *tables), *tables)


def test_a_model_without_regions_gathers_rows_before_its_last_mlp() -> None:
    torch.manual_seed(0)
    module = helpers.captured_module(Unrolled(), flat=True)
    values = {"token_ids": torch.tensor(IDS), "positions": torch.arange(len(IDS))}
    (want,) = helpers.evaluate(module, values, len(IDS))
    hits = lowered(module)
    assert list(module.graphs()) == [""]
    names = ("page_attention", "merge_qkv", "merge_gate_up", "fuse_qk_norm_rope_kv_write")
    assert [hits[name][1] for name in names] == [2, 2, 2, 2]
    calls = [str(n.target) for n in module.root.graph.nodes if is_kernel_call(n)]
    assert calls.index("paged_attention_1") < calls.index("index_select") < calls.index("linear_4")
    helpers.assert_same([want], [paged_logits(module)])
