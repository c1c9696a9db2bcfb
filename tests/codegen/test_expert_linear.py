"""The matrix product of a mixture of experts: odd sizes, dtypes, strides, any batch, any split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aios_compile.codegen.cpp import build, expert_linear
from aios_compile.codegen.cpp.expert_linear import ExpertLinearSpec
from tests.codegen.kernels import call, library, operands_of, trace

f32, bf16, f16, i64 = torch.float32, torch.bfloat16, torch.float16, torch.int64
# name -> experts E, columns N, inner K, choices A (of each row of x), dtype of weights, bias
CASES: dict[str, tuple[int, int, int, int, torch.dtype, bool]] = {
    "mixtral": (8, 96, 64, 2, bf16, False),
    "bias": (4, 48, 32, 4, bf16, True),
    "odd": (5, 37, 19, 3, f32, True),
    "half": (3, 33, 70, 1, f16, False),
    "one_expert": (1, 7, 5, 1, f32, False),
    "narrow": (6, 1, 3, 2, f32, True),
}
PORTABLE = build.Target.named("portable")


def product(bias: bool) -> Any:
    op = torch.ops.aios.expert_linear.default
    if bias:
        return lambda x, w, e, b: op(x, w, e.view(-1), b)
    return lambda x, w, e: op(x, w, e.view(-1))


@pytest.fixture(scope="module")
def built() -> Any:
    made = {}
    for name, (experts, columns, inner, choices, dtype, bias) in CASES.items():
        inputs: list[Any] = [(("T", inner), f32), ((experts, columns, inner), dtype)]
        inputs += [(("T", choices), i64)] + ([((experts, columns), dtype)] if bias else [])
        body = trace(product(bias), *inputs)
        spec = expert_linear.spec_of(body, operands_of(body))
        assert spec is not None, name
        made[name] = (spec, expert_linear.emit(spec))
    sources = [source for _, source in made.values()]
    return made, {t.name: library(sources, t) for t in (build.Target.host(), PORTABLE)}


def inputs(name: str, tokens: int) -> list[Tensor]:
    experts, columns, inner, choices, dtype, bias = CASES[name]
    found = [torch.randn(tokens, inner), torch.randn(experts, columns, inner).to(dtype)]
    found.append(torch.randint(0, experts, (tokens, choices)))
    return found + ([torch.randn(experts, columns).to(dtype)] if bias else [])


def run(built: Any, name: str, tensors: list[Tensor], split: int = 1, target: str = "") -> Tensor:
    source = built[0][name][1]
    tokens, choices = tensors[2].shape
    out = torch.full((tokens * choices, tensors[1].shape[1]), float("nan"))
    lib = built[1][target or build.Target.host().name]
    call(lib, source, [*tensors, out], {"T": tokens}, split)
    return out


def wanted(spec: ExpertLinearSpec, tensors: list[Tensor]) -> Tensor:
    x, weight, experts, *bias = tensors
    chosen = weight[experts].double()  # [T, A, N, K]
    out = torch.einsum("tank,tk->tan", chosen, x.double())
    if bias:
        out = out + bias[0][experts].double()
    return out.flatten(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_the_product_with_each_chosen_matrix(name: str, built: Any) -> None:
    spec, _ = built[0][name]
    for tokens in (1, 2, 7, 33):
        tensors = inputs(name, tokens)
        want = wanted(spec, tensors)
        for target, split in (("", 1), ("", 3), (PORTABLE.name, 1)):
            out = run(built, name, tensors, split, target)
            torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)
        x, weight, experts, *bias = tensors
        found = expert_linear.reference(spec, x, weight, experts.view(-1), *bias)
        torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_depend_on_the_other_rows_or_the_split(name: str, built: Any) -> None:
    tensors = inputs(name, 29)
    together, choices = run(built, name, tensors), CASES[name][3]
    assert torch.equal(run(built, name, tensors, split=5), together)
    for token in (0, 13, 28):
        x, weight, experts, *bias = tensors
        one = [x[token : token + 1], weight, experts[token : token + 1], *bias]
        rows = together[token * choices : (token + 1) * choices]
        assert torch.equal(run(built, name, one), rows)


def test_all_rows_choose_one_expert_and_ids_from_the_end(built: Any) -> None:
    tensors = inputs("odd", 11)
    tensors[2].fill_(3)
    expected = run(built, "odd", tensors)
    torch.testing.assert_close(
        expected.double(), wanted(built[0]["odd"][0], tensors), rtol=2e-5, atol=2e-5
    )
    tensors[2].fill_(-2)
    assert torch.equal(run(built, "odd", tensors), expected)


def test_an_id_out_of_range_reads_no_other_memory(built: Any) -> None:
    tensors = inputs("mixtral", 3)
    tensors[2][:] = torch.tensor([7, 1 << 40])
    clamped = [*tensors[:2], torch.full_like(tensors[2], 7)]
    assert torch.equal(run(built, "mixtral", tensors), run(built, "mixtral", clamped))


def test_other_bodies_are_refused() -> None:
    op = torch.ops.aios.expert_linear.default
    for function, given in (
        (lambda x, w, e: op(x * 2, w, e), [(("T", 8), f32), ((4, 5, 8), f32), (("T",), i64)]),
        (lambda x, w, e: op(x, w, e) + 1, [(("T", 8), f32), ((4, 5, 8), f32), (("T",), i64)]),
        (lambda x, w, e: w[e] @ x[:, :, None], [(("T", 8), f32), ((4, 5, 8), f32), (("T",), i64)]),
    ):
        body = trace(function, *given)
        assert expert_linear.spec_of(body, operands_of(body)) is None
