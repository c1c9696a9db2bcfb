"""topk and the product of a mixture of experts on Triton, in the interpreter: the C++ cases."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.codegen import test_expert_linear as experts
from tests.codegen import test_topk as tops
from tests.codegen.kernels import operands_of, trace

pytest.importorskip("triton")

from aios_compile.codegen.triton import expert_linear, topk
from tests.codegen.triton_kernels import Kernel


@functools.cache
def made(name: str):
    count, columns, inner, choices, dtype, bias = experts.CASES[name]
    inputs = [(("T", inner), torch.float32), ((count, columns, inner), dtype)]
    inputs += [(("T", choices), torch.int64)] + ([((count, columns), dtype)] if bias else [])
    body = trace(experts.product(bias), *inputs)
    spec = expert_linear.spec_of(body, operands_of(body))
    assert spec is not None
    with pytest.MonkeyPatch.context() as patch:  # both variants, on few pairs
        patch.setattr(expert_linear, "VARIANTS", ((6, 16, 64, 32), (None, 16, 32, 16)))
        return spec, Kernel(expert_linear.emit(spec))


def run(name: str, tensors):
    _, built = made(name)
    out = torch.full((tensors[2].numel(), tensors[1].shape[1]), float("nan"))
    built({"T": len(tensors[0])}, *tensors, out)
    return out


@pytest.mark.parametrize("name", experts.CASES)
def test_the_product_with_each_chosen_matrix(name: str) -> None:
    spec = made(name)[0].spec
    for tokens in (1, 9):
        tensors = experts.inputs(name, tokens)
        tolerance = 2e-5 if tensors[1].dtype != torch.bfloat16 else 3e-4  # x in two bf16 parts
        want = experts.wanted(spec, tensors)
        torch.testing.assert_close(run(name, tensors).double(), want, rtol=2e-5, atol=tolerance)


def test_all_choose_one_expert_from_the_end_or_out_of_range() -> None:
    tensors = experts.inputs("odd", 11)
    tensors[2].fill_(3)
    first = run("odd", tensors)
    want = experts.wanted(made("odd")[0].spec, tensors)
    torch.testing.assert_close(first.double(), want, rtol=2e-5, atol=2e-5)
    tensors[2].fill_(-2)
    assert torch.equal(run("odd", tensors), first)
    tensors = experts.inputs("mixtral", 3)
    tensors[2][:] = torch.tensor([7, 1 << 40])
    clamped = [*tensors[:2], torch.full_like(tensors[2], 7)]
    assert torch.equal(run("mixtral", tensors), run("mixtral", clamped))


def test_a_row_does_not_depend_on_the_others_of_its_variant() -> None:
    x, weight, chosen, bias = experts.inputs("bias", 12)
    together = run("bias", [x, weight, chosen, bias])
    pair = run("bias", [x[5:7], weight, chosen[5:7], bias])
    assert torch.equal(pair, together[20:28])


@pytest.mark.parametrize("name", [*tops.CASES, "only_0", "only_1"])
def test_topk_is_a_stable_sort(name: str) -> None:
    only = name.startswith("only")
    function, given, dim, largest, k, strides = tops.CASES["router" if only else name]
    body = trace(tops.only(int(name[-1])) if only else tops.both(function), given)
    spec = topk.spec_of(body, operands_of(body, strides))
    assert spec is not None
    built = Kernel(topk.emit(spec))
    for tokens in (1, 5):
        for x in tops.inputs(*given, strides.get(0), tokens):
            tensors = tops.operands(spec.spec, {"T": tokens}, x)
            built({"T": tokens}, *tensors)
            seen = x[:, 3:9] if name == "part" else x
            wanted = torch.sort(seen, dim=dim, descending=largest, stable=True)
            for (which, _, _), found in zip(spec.spec.outputs, tensors[1:]):
                want = wanted[which].narrow(dim, 0, k)
                assert torch.equal(found.nan_to_num(7.5), want.nan_to_num(7.5)), name
