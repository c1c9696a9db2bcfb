"""What the clock may choose among gives the same bits; what a ledger says is emitted, and alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import __version__ as TRITON

from aios_compile.codegen.operand import dim_value
from aios_compile.codegen.triton import kernel_ledger, linear, quantized_linear
from aios_compile.codegen.triton.binary_cache import every_launch
from aios_compile.codegen.triton.cards import CARDS, card_of
from aios_compile.codegen.triton.choice import NEAR, Tuning
from aios_compile.codegen.triton.configs import Config
from aios_compile.codegen.triton.cost_model import cost
from aios_compile.codegen.triton.kernel_ledger import Entry, KernelLedger
from aios_compile.config import CompileOptions
from aios_compile.errors import CodegenError
from aios_compile.study.gpu_compile import CHOSEN, measured_lines, shipped_tuning
from tests.codegen.harness import make_body
from tests.codegen.test_triton_linear import normed_and_gated, plain
from tests.codegen.test_triton_quantized_linear import plain as quantized
from tests.codegen.test_triton_quantized_linear import quantized_body
from tests.codegen.triton_modules import load, poisoned
from tests.codegen.triton_shapes import LAYERS, MODELS, linear_spec
from tests.variants import nightly

GPU, TARGET = "NVIDIA H200", "cuda:90"
f32, bf16 = torch.float32, torch.bfloat16


def small_spec(function=plain, columns: int = 48, depth: int = 512) -> Any:
    extra = {"g": ((depth,), f32)} if function is normed_and_gated else {}
    inputs = {"x": (("T", depth), f32), "w": ((columns, depth), bf16), **extra}
    spec = linear.spec_of(*make_body(function, inputs))
    assert spec is not None
    return spec


@pytest.mark.parametrize("function", [normed_and_gated, *nightly(plain)])
def test_every_candidate_gives_the_bits_of_the_standard_kernel(function) -> None:
    spec = small_spec(function)
    source = linear.emit(spec, card_of(TARGET), tuning=Tuning(timed=2))
    module, seen = load(source), 0
    x, w, g = torch.randn(70, 512), torch.randn(48, 512).bfloat16(), torch.randn(512)
    columns = 48 if function is plain else 24
    for tokens in (1, 3, 13, 70):
        variant = module.variant_of(T=tokens)
        given = [x[:tokens], w, *([g] if function is normed_and_gated else [])]
        spaces = [poisoned(_sizes(operand, tokens)) for operand in source.workspace]
        results = {}
        for name in (None, *variant.get("candidates", {})):
            out, counters = poisoned((tokens, columns)), torch.zeros(source.counters).int()
            operands = [*given, out, *spaces, *([counters] if source.counters else [])]
            module.launch(operands, T=tokens, candidate=name)
            results[name] = out
        assert not results[None].isnan().any()
        for name, out in results.items():
            assert torch.equal(out, results[None]), (tokens, name)
        seen += len(results) - 1
    assert seen >= 3 and {c.name for c in source.candidates} == {
        known.candidate for known in every_launch(module) if known.candidate
    }


def _sizes(operand: Any, tokens: int) -> list[int]:
    return [dim_value(d, {"T": tokens}) for d in operand.shape]


@pytest.mark.parametrize("target", CARDS)
def test_candidates_are_near_and_of_one_order(target: str) -> None:
    """Of the layers of two models: one way to add in each range, and not far by the model."""
    card, several = card_of(target), 0
    for model in MODELS:
        for layer in LAYERS:
            spec = linear_spec(model, layer)
            for made in linear.choices(spec, card, Tuning(timed=2)):
                assert len({made.config.text(), *(c.text() for c in made.others)}) == 1 + len(
                    made.others
                )
                for other in made.others:
                    assert other.bits == made.config.bits
                    if other.kind == "descriptor":
                        assert made.config.kind == "tile" and card.dependent_launch
                        continue
                    tokens = made.most or 2048
                    assert cost(other, linear.problem_of(spec), tokens, card).us <= (
                        NEAR * made.cost.us
                    )
                several += bool(made.others)
    assert several > 30, "of 50 to 60 ranges"
    assert not any(c.others for c in linear.choices(spec, card)), "none unless they are timed"
    assert linear.emit(spec, card) == linear.emit(spec, card, tuning=Tuning()), "the same text"


def ledger_of(spec: Any, name: str, config: Config, most: int | None) -> KernelLedger:
    signature = linear.problem_of(spec).signature(name)
    rows = {kernel_ledger.rows_name(most): Entry(config.text(), most or 2048, 300.0, 1.04, 25)}
    return KernelLedger(GPU, TARGET, "3.6", "today", {signature: rows})


def test_what_the_ledger_says_is_emitted_alone() -> None:
    spec, card = linear_spec("Qwen3-0.6B", "qkv"), card_of(TARGET)
    made = {c.most: c for c in linear.choices(spec, card, Tuning(timed=2))}
    for most, other in ((1, made[1].others[0]), (None, made[None].others[-1])):
        ledger = ledger_of(spec, "linear", other, most)
        found = {c.most: c for c in linear.choices(spec, card, Tuning(ledger=ledger, timed=2))}
        assert found[most].config == other and not found[most].others
        assert "measured, 1.040x of a step" in found[most].text()
        assert found[16] == made[16], "what it lacks is chosen and timed as ever"
        source = linear.emit(spec, card, tuning=Tuning(ledger=ledger, timed=2))
        assert f"{other.text()}: measured" in source.text
    gone = ledger_of(spec, "linear", Config("rows", 1, 3, 96, 4), 1)
    assert linear.choices(spec, card, Tuning(ledger=gone, timed=2)) == list(made.values())
    elsewhere = ledger_of(spec, "fp8_linear", made[1].others[0], 1)
    assert linear.choices(spec, card, Tuning(ledger=elsewhere, timed=2)) == list(made.values())


def test_a_measured_order_decides_for_fewer_rows() -> None:
    """Tiles for up to 16 rows add as those for 32; an entry that does not is not used."""
    spec, card = linear_spec("Llama-3.1-8B", "o"), card_of(TARGET)
    made = {c.most: c for c in linear.choices(spec, card)}
    block_k, *_ = made[32].config.order
    other = Config("dot", 32, 16, 64 if block_k != 64 else 128, 4, 3)
    wide = ledger_of(spec, "linear", other, 32)
    wrong = ledger_of(spec, "linear", made[16].config, 16).entries
    signature = next(iter(wrong))
    rows = {**wide.entries[signature], **wrong[signature]}
    ledger = KernelLedger(GPU, TARGET, "3.6", "today", {signature: rows})
    found = {c.most: c for c in linear.choices(spec, card, Tuning(ledger=ledger))}
    assert found[32].config == other and found[16].config.order == other.order
    assert found[16].entry is None and found[16].config != made[16].config


def test_quantised_kernels_have_candidates_too() -> None:
    body, operands = quantized_body(quantized, "int4_g32_f16", 64, 512)
    spec = quantized_linear.spec_of(body, operands)
    source = quantized_linear.emit(spec, card_of(TARGET), tuning=Tuning(timed=2))
    assert source.candidates and all("4.5 bits" in c.type for c in source.candidates)
    module = load(source)
    assert {v["most"] for v in module.VARIANTS if v.get("candidates")}


def test_a_ledger_goes_round_and_is_refused_where_it_does_not_hold(tmp_path: Path) -> None:
    entry = Entry("rows 1x2x512 2 warps", 1, 311.5, 1.02, 25)
    ledger = KernelLedger(GPU, TARGET, "3.6", "2026-11-22 abc", {"linear 1x8x8": {"1": entry}})
    path = ledger.write(tmp_path)
    assert path.name == "nvidia_h200.json"
    found, line = kernel_ledger.shipped(GPU, TARGET, "3.6.2", tmp_path)
    assert found == ledger and "2026-11-22 abc: 1 kernels" in line
    assert found.entry("linear 1x8x8", 1) == entry and found.entry("linear 1x8x8", None) is None
    for gpu, target, triton, why in (
        ("NVIDIA H100", TARGET, "3.6.0", "no ledger of kernels for NVIDIA H100"),
        ("NVIDIA-H200", TARGET, "3.6.0", "is of NVIDIA H200, cuda:90: not used on NVIDIA-H200"),
        (GPU, "cuda:100", "3.6.0", "not used on NVIDIA H200, cuda:100"),
        (GPU, TARGET, "3.7.1", "was measured with triton 3.6: not used with 3.7.1"),
    ):
        none, line = kernel_ledger.shipped(gpu, target, triton, tmp_path)
        assert none is None and why in line
    newer = KernelLedger(GPU, TARGET, "3.6", "later", {"linear 1x8x8": {"16": entry}})
    both = ledger.merged(newer)
    assert set(both.entries["linear 1x8x8"]) == {"1", "16"} and both.measured == "later"
    for damaged in ("{", "[]", json.dumps({**ledger.to_json(), "format": 9})):
        path.write_text(damaged)
        with pytest.raises(CodegenError, match="is not a ledger of kernels"):
            kernel_ledger.shipped(GPU, TARGET, "3.6.0", tmp_path)


def test_a_card_that_is_not_here_takes_its_gpus_ledger(tmp_path: Path) -> None:
    """What `aios compile --target cuda:90` uses, and says."""
    options, card = CompileOptions.parse({"device": "cuda"}), card_of(TARGET)
    tuning, line = shipped_tuning(options, card, tmp_path)
    assert tuning is None and line.startswith("the ledger of kernels is empty for cuda:90")
    entry = Entry("rows 1x2x512 2 warps", 1, 311.5, 1.02, 25)
    version = kernel_ledger.minor_version(TRITON)
    for gpu, target, day in (
        ("NVIDIA A100", "cuda:80", "1"), ("NVIDIA H100 80GB HBM3", TARGET, "2"), (GPU, TARGET, "3"),
    ):  # fmt: skip
        rows = {"linear 1x8x8": {"1": entry}}
        KernelLedger(gpu, target, version, day, rows).write(tmp_path)
    tuning, line = shipped_tuning(options, card, tmp_path)
    assert tuning is not None and tuning.ledger.gpu == GPU
    assert line == "nvidia_h200.json, measured 3: 1 kernels"
    kernel_ledger.path_of(GPU, tmp_path).unlink()
    tuning, line = shipped_tuning(options, card, tmp_path)
    assert tuning is not None and "nvidia_h100_80gb_hbm3.json" in line, "another of its kind"
    assert kernel_ledger.of_card(TARGET, "H200", "2.9.1", tmp_path)[0] is None
    joined = CompileOptions.parse({"device": "cuda", "persistent_decode": True})
    tuning, line = shipped_tuning(joined, card, tmp_path)
    assert tuning is None and "is not used" in line
    spec = linear_spec("Qwen3-0.6B", "qkv")
    other = linear.choices(spec, card, Tuning(timed=2))[0].others[0]
    source = linear.emit(spec, card, tuning=Tuning(ledger=ledger_of(spec, "linear", other, 1)))
    report = SimpleNamespace(row=SimpleNamespace(name="qkv"), chosen=CHOSEN.findall(source.text))
    (used,) = measured_lines([report])  # type: ignore[list-item]
    assert used.startswith(f"qkv: up to 1 rows: {other.text()}: measured, 1.040x")
