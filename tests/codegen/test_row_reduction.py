"""Row reductions against eager and the spec's reference: norms, softmax, sums, odd sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aios_compile.codegen.cpp import build, row_reduction
from aios_compile.codegen.expression import TORCH_DTYPES
from tests.codegen.kernels import call, example, library, operands_of, trace

f32, bf16, i64 = torch.float32, torch.bfloat16, torch.int64
aios = torch.ops.aios
TOKENS = (1, 5, 37)


@dataclass(frozen=True)
class Case:
    function: Callable[..., Any]
    inputs: Sequence[tuple[Sequence[Any], torch.dtype]]
    strides: dict[int, Sequence[Any]] = field(default_factory=dict)


def rms(x: Tensor, w: Tensor) -> Tensor:
    return aios.rms_norm(x, w, 1e-6, False)  # type: ignore[no-any-return]


def gemma(x: Tensor, w: Tensor) -> Tensor:
    """Spelled out, with (1 + w): what a pass that knows nothing leaves."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + w)


CASES = {
    "rms_norm": Case(rms, [(("T", 70), f32), ((70,), f32)]),
    "rms_norm_strided": Case(rms, [(("T", 70), f32), ((70,), f32)], {0: (200, 1), 2: (71, 1)}),
    "rms_norm_plain": Case(lambda x: aios.rms_norm(x, None, 1e-6, True), [(("T", 16), f32)]),
    "rms_norm_bf16_weight": Case(
        lambda x, w: aios.rms_norm(x, w, 1e-6, True), [(("T", 70), f32), ((70,), bf16)]
    ),
    "vector_norm": Case(lambda x: torch.linalg.vector_norm(x, 2, -1), [(("T", 33), f32)]),
    "head_norm": Case(
        lambda x, w: rms(x.view(-1, 4, 16), w).view(-1, 64), [(("T", 64), f32), ((16,), f32)]
    ),
    "add_rms_norm": Case(
        lambda x, r, w: (x + r, rms(x + r, w)),
        [(("T", 33), f32), (("T", 33), f32), ((33,), f32)],
    ),
    "gemma_norm": Case(gemma, [(("T", 33), f32), ((33,), f32)]),
    "layer_norm": Case(
        lambda x, w, b: aios.layer_norm(x, w, b, 1e-5),
        [(("T", 33), f32), ((33,), f32), ((33,), f32)],
    ),
    "native_layer_norm": Case(lambda x: F.layer_norm(x, (33,)) * 2, [(("T", 33), f32)]),
    "softmax": Case(lambda x: torch.softmax(x * 2, -1), [(("T", 3, 33), f32)]),
    "softmax_of_columns": Case(lambda x: torch.softmax(x, 1), [((3, 19, "T"), f32)]),
    "log_softmax": Case(lambda x: torch.log_softmax(x, -1), [(("T", 100), f32)]),
    "sum": Case(lambda x: x.sum(-1), [(("T", 5), f32)]),
    "sum_kept": Case(lambda x: (x * x).sum(-1, keepdim=True), [(("T", 129), f32)]),
    "sum_of_columns": Case(lambda x: x.sum(0), [(("T", 33), f32)]),
    "mean_of_two": Case(lambda x: x.mean((0, 2)), [(("T", 3, 33), f32)]),
    "sum_of_all": Case(lambda x: x.sum(), [(("T", 33), f32)]),
    "max_min": Case(lambda x: (x.amax(-1), x.amin(-1)), [(("T", 33), f32)]),
    "argmax": Case(lambda x: (x.argmax(-1), x.argmin(-1, keepdim=True)), [(("T", 33), f32)]),
    "max_with_index": Case(lambda x: x.max(1), [(("T", 33), f32)]),
    "var": Case(lambda x: x.var(-1), [(("T", 33), f32)]),
    "var_mean": Case(lambda x: torch.var_mean(x, -1, correction=0), [(("T", 33), f32)]),
    "prod": Case(lambda x: (x * 0.5).prod(-1), [(("T", 9), f32)]),
    "any": Case(lambda x: (x > 2).any(-1), [(("T", 33), f32)]),
    "whole_sum": Case(lambda x: (x + 1).sum(-1), [(("T", 33), i64)]),
    "half_norm": Case(rms, [(("T", 70), bf16), ((70,), bf16)]),
}
LOOSE = {"half_norm": 1.6e-2}


@pytest.fixture(scope="module")
def built() -> tuple[dict[str, Any], ctypes.CDLL]:
    made = {}
    for name, case in CASES.items():
        body = trace(case.function, *case.inputs)
        spec = row_reduction.spec_of(body, operands_of(body, dict(case.strides)))
        assert spec is not None, name
        made[name] = (body, spec, row_reduction.emit(spec))
    return made, library([source for _, _, source in made.values()])


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_eager_and_reference(name: str, built: Any) -> None:
    body, spec, source = built[0][name]
    count = len(CASES[name].inputs)
    tolerance = LOOSE.get(name, 2e-5)
    for tokens in TOKENS:
        sizes = {"T": tokens}
        tensors = [
            example(o, sizes, TORCH_DTYPES[o.dtype], seed) for seed, o in enumerate(spec.operands)
        ]
        xs, outs = tensors[:count], tensors[count:]
        result = body(*xs)
        wanted: Sequence[Tensor] = result if isinstance(result, (tuple, list)) else [result]
        results = []
        for split in (1, 3):
            call(built[1], source, [*xs, *outs], sizes, split)
            results.append([out.clone() for out in outs])
        for got, want in zip(results[0], wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
        for got, want in zip(row_reduction.reference(spec, *xs), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
        for a, b in zip(*results, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", ["rms_norm", "softmax", "log_softmax", "head_norm"])
def test_a_row_does_not_depend_on_the_other_rows(name: str, built: Any) -> None:
    """The order of a sum is a property of the kernel: T = 1 gives the bits of T = 37."""
    _, spec, source = built[0][name]
    tensors = [example(o, {"T": 37}, f32, seed) for seed, o in enumerate(spec.operands)]
    call(built[1], source, tensors, {"T": 37})
    alone = [tensors[0][9:10].clone(), *tensors[1:-1], torch.empty_like(tensors[-1][9:10])]
    call(built[1], source, alone, {"T": 1})
    assert torch.equal(alone[-1][0], tensors[-1][9])


def test_output_may_overwrite_the_input_of_its_row(built: Any) -> None:
    _, _, source = built[0]["rms_norm"]
    assert source.inplace == ((0, 0),)
    x, w = torch.randn(5, 70), torch.randn(70)
    want = rms(x, w)
    call(built[1], source, [x, w, x], {"T": 5})
    torch.testing.assert_close(x, want)
    assert built[0]["head_norm"][2].inplace == ((0, 0),)


def test_nan_stays_in_its_row(built: Any) -> None:
    _, _, source = built[0]["softmax"]
    x, out = torch.randn(5, 3, 33), torch.empty(5, 3, 33)
    x[2, 1, 7] = float("nan")
    call(built[1], source, [x, out], {"T": 5})
    assert out[2, 1].isnan().all() and out.isnan().sum() == 33


def test_reductions_over_different_dimensions_are_refused() -> None:
    body = trace(lambda x: x.sum(0) + x.sum(1)[:9].sum(), (("T", 9), f32))
    assert row_reduction.spec_of(body, operands_of(body)) is None


@pytest.mark.parametrize(
    "norm",
    [lambda x: torch.linalg.vector_norm(x, 1, -1), lambda x: torch.linalg.vector_norm(x, 3, -1)],
)
def test_norms_of_other_orders_are_refused(norm: Any) -> None:
    body = trace(norm, (("T", 33), f32))
    assert row_reduction.spec_of(body, operands_of(body)) is None


def test_every_vector_width_is_right() -> None:
    body = trace(lambda x: torch.softmax(x, -1), (("T", 37), f32))
    spec = row_reduction.spec_of(body, operands_of(body))
    assert spec is not None
    source = row_reduction.emit(spec)
    x, out = torch.randn(5, 37), torch.empty(5, 37)
    for target, needs in build.TARGETS:
        if needs <= build.cpu_features():
            call(library([source], target), source, [x, out], {"T": 5})
            torch.testing.assert_close(out, torch.softmax(x, -1))
