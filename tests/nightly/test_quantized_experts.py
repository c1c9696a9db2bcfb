"""Mixtures of quantised experts, against transformers on the weights that the codes mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import aios_compile
from aios_compile.errors import CheckpointError
from aios_compile.ir import ops
from aios_compile.ir.quant_format import SHORT_NAMES, QuantFormat
from aios_compile.ir.quantized import dequantize
from tests.foreign.experts import EXPERTS
from tests.quick_builds import build_quickly

assert ops.TABLE
pytestmark = pytest.mark.nightly
IDS = [3, 5, 7, 11, 13, 17, 19]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64}
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "qwen2_moe")


def build(name: str) -> Any:
    """Return a family's tiny model in bfloat16, of sizes that fill groups and blocks."""
    transformers = pytest.importorskip("transformers")
    stem, sizes = EXPERTS[name]
    sizes = {**sizes, **WIDE}
    if name == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = 64
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**sizes)
    return getattr(transformers, f"{stem}ForCausalLM")(config).eval().to(torch.bfloat16)


def round_as_quantised(model: Any, found: Any, form: str) -> int:
    """Give the model the values of its quantised weights; return how many matrices that were."""
    parameters, rounded = dict(model.named_parameters()), 0
    for entry in found.program.weights:
        if not entry.packed.startswith("quant16"):
            continue
        for name, parameter in parameters.items():
            if f"'{name}'" not in entry.recipe:
                continue
            turned = "permute" in entry.recipe
            with torch.no_grad():
                w = parameter.transpose(1, 2) if turned else parameter
                rows = torch.ops.aios.quantize_rows(w.bfloat16(), form)
                values = dequantize(rows, QuantFormat.parse(form))
                parameter.copy_(values.transpose(1, 2) if turned else values)
            rounded += 1
    return rounded


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_weights_that_the_codes_mean(
    name: str, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_quickly(monkeypatch)
    model = build(name)
    with aios_compile.load_and_compile(model, quantization=bits, progress=False) as found:
        row = next(r for r in found.report().passes if r.name == "quantize_weights")
        assert all("rows is too small" in r for r in row.refusals), row.refusals  # routers, gates
        packed = [w for w in found.program.weights if len(w.shape) == 3]
        assert len(packed) == 4 and all(w.packed.startswith("quant16") for w in packed)
        exact = model.float()
        assert round_as_quantised(exact, found, SHORT_NAMES[bits]) >= 8
        want = exact(torch.tensor([IDS])).logits[0]
        got = found(IDS)
        assert (got - want).abs().max() < 0.03 * want.abs().max()
        for tokens in (1, 4):  # the same bits however many tokens are beside
            assert torch.equal(found(IDS[:tokens])[0], got[0])


def test_a_value_that_is_none_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    build_quickly(monkeypatch)
    model = build("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 5, 7] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj.* NaN"):
        aios_compile.load_and_compile(model, quantization="int8", progress=False)
