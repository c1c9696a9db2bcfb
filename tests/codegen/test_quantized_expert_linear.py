"""A mixture's product on quantised matrices: the definition, any batch, any split, any target."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from aios_compile.codegen.cpp import build, quantized_expert_linear
from aios_compile.codegen.packing import pack_quant16
from aios_compile.ir import ops
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantized import dequantize
from tests.codegen.harness import Kernel, make_body
from tests.variants import nightly

assert ops.TABLE
aios = torch.ops.aios
RUNNABLE = [t.name for t, needs in build.TARGETS if needs <= build.cpu_features()]
# name -> experts E, columns N, inner K, choices A (of each row of x), format, bias
CASES: dict[str, tuple[int, int, int, int, str, bool]] = {
    "mixtral": (6, 160, 96, 2, "int8_g32_f16", False),  # a panel and a part of one
    "bias": (4, 48, 64, 3, "int4_g32_f16", True),  # an odd number of blocks
    "one_expert": (1, 16, 544, 1, "uint4_g32_f16_min_f16", False),  # tokens of two parts
}
TOKENS = (1, 2, 9, 33)
SOME = ["mixtral", "bias", *nightly("one_expert")]


def product(x: Any, w: Any, e: Any, form: str, bias: Any = None) -> Any:
    chosen = torch.ops.aten.view.default(e, [-1])
    return aios.quantized_expert_linear.default(x, w, chosen, form, bias)


@functools.cache
def made(name: str) -> Any:
    experts, columns, inner, choices, form, bias = CASES[name]
    rows = (experts, columns, QuantFormat.parse(form).row_bytes(inner))
    inputs: dict[str, Any] = {"x": (("T", inner), torch.float32), "w": (rows, torch.uint8)}
    inputs["e"] = (("T", choices), torch.int64)
    inputs |= {"b": ((experts, columns), torch.bfloat16)} if bias else {}
    biased = lambda x, w, e, b: product(x, w, e, form, b)  # noqa: E731
    traced = biased if bias else lambda x, w, e: product(x, w, e, form)
    body, operands = make_body(traced, inputs, packed={"w": f"quant16.{form}"})
    spec = quantized_expert_linear.spec_of(body, operands)
    assert spec is not None
    return spec, body, quantized_expert_linear.emit(spec)


def inputs_of(name: str, tokens: int) -> list[Tensor]:
    experts, columns, inner, choices, form, bias = CASES[name]
    torch.manual_seed(tokens)
    weight = torch.randn(experts, columns, inner)
    found = [torch.randn(tokens, inner), aios.quantize_rows(weight, form)]
    found.append(torch.randint(0, experts, (tokens, choices)))
    return found + ([torch.randn(experts, columns).bfloat16()] if bias else [])


def run(name: str, tensors: list[Tensor], target: str = "", splits: int = 1) -> Tensor:
    form = QuantFormat.parse(CASES[name][4])
    x, rows, experts, *bias = tensors
    stored = pack_quant16(rows.flatten(0, 1).numpy(), form)
    out = torch.full((experts.numel(), rows.shape[1]), float("nan"))
    built = Kernel(made(name)[2], build.Target.named(target or RUNNABLE[0]))
    built({"T": len(x)}, x, stored, experts, *bias, out, splits=splits)
    return out


@pytest.mark.parametrize("name", SOME)
def test_kernel_is_the_product_with_each_chosen_matrix(name: str) -> None:
    spec, body, _ = made(name)
    form = CASES[name][4]
    for tokens in TOKENS:
        tensors = inputs_of(name, tokens)
        out = run(name, tensors)
        want = quantized_expert_linear.reference(spec, body, *tensors)
        close(out, want, 2e-6)
        x, rows, experts, *bias = tensors
        chosen = dequantize(rows, QuantFormat.parse(form))[experts].double()
        exact = torch.einsum("tank,tk->tan", chosen, x.double())
        exact = exact + bias[0][experts].double() if bias else exact
        close(out, exact.flatten(0, 1).float(), 0.02)  # activations of 8 bits
        assert torch.equal(run(name, tensors, splits=3), out)


def close(found: Tensor, want: Tensor, part: float) -> None:
    assert (found - want).abs().max() <= part * want.abs().max()


@pytest.mark.parametrize("target", nightly(*RUNNABLE[1:]))
@pytest.mark.parametrize("name", CASES)
def test_all_targets_give_the_same_bits(name: str, target: str) -> None:
    for tokens in TOKENS:
        tensors = inputs_of(name, tokens)
        assert torch.equal(run(name, tensors, target), run(name, tensors))


@pytest.mark.parametrize("name", SOME)
def test_a_row_does_not_depend_on_the_other_rows(name: str) -> None:
    tensors, choices = inputs_of(name, 29), CASES[name][3]
    together = run(name, tensors)
    x, rows, experts, *bias = tensors
    for t in (0, 13, 28):
        one = run(name, [x[t : t + 1], rows, experts[t : t + 1], *bias])
        assert torch.equal(one, together[t * choices : (t + 1) * choices])


def test_all_rows_choose_one_expert_and_ids_from_the_end() -> None:
    tensors = inputs_of("mixtral", 21)
    tensors[2].fill_(4)
    expected = run("mixtral", tensors)
    for same in (-2, 4):
        tensors[2].fill_(same)
        assert torch.equal(run("mixtral", tensors), expected)
    tensors[2].fill_(4000)  # what only a broken router asks for reads no other memory
    last = run("mixtral", tensors)
    tensors[2].fill_(5)
    assert torch.equal(run("mixtral", tensors), last)


def test_nan_stays_in_its_row() -> None:
    tensors = inputs_of("mixtral", 9)
    tensors[0][4, 40] = float("nan")
    out = run("mixtral", tensors).view(9, 2, -1)
    assert out[4].isnan().all() and out[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
