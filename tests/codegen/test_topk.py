"""topk and sort kernels against a stable sort: odd sizes, ties, NaN, strides, any split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from aios_compile.codegen.cpp import topk
from aios_compile.codegen.expression import TORCH_DTYPES
from tests.codegen.kernels import call, example, library, operands_of, trace

f32, bf16, f64, i64 = torch.float32, torch.bfloat16, torch.float64, torch.int64
Inputs = Sequence[tuple[Sequence[Any], torch.dtype]]
# name -> (body, input, a stable sort's dim and direction, K, strides by operand)
CASES: dict[str, tuple[Callable[..., Any], Any, int, bool, int, dict[int, Any]]] = {
    "router": (lambda x: torch.topk(x, 2), (("T", 8), f32), -1, True, 2, {}),
    "odd": (lambda x: torch.topk(x, 5), (("T", 37), f32), -1, True, 5, {}),
    "one": (lambda x: torch.topk(x, 1), (("T", 33), f32), -1, True, 1, {}),
    "all": (lambda x: torch.topk(x, 13), (("T", 13), f32), -1, True, 13, {}),
    "of_one": (lambda x: torch.topk(x, 1), (("T", 1), f32), -1, True, 1, {}),
    "smallest": (lambda x: torch.topk(x, 3, largest=False), (("T", 9), f32), -1, False, 3, {}),
    "groups": (lambda x: torch.topk(x, 2, dim=1), (("T", 6, 3), f32), 1, True, 2, {}),
    "bf16": (lambda x: torch.topk(x, 3), (("T", 12), bf16), -1, True, 3, {}),
    "f64": (lambda x: torch.topk(x, 3), (("T", 12), f64), -1, True, 3, {}),
    "ids": (lambda x: torch.topk(x, 4), (("T", 21), i64), -1, True, 4, {}),
    "gaps": (lambda x: torch.topk(x, 3), (("T", 7), f32), -1, True, 3, {0: (20, 2), 1: (9, 3)}),
    "part": (lambda x: torch.topk(x[:, 3:9], 2), (("T", 16), f32), -1, True, 2, {}),
    "sort": (lambda x: torch.sort(x, -1), (("T", 11), f32), -1, False, 11, {}),
    "sort_down": (
        lambda x: torch.sort(x, stable=True, dim=0, descending=True),
        ((11, "T"), f32), 0, True, 11, {},
    ),
}  # fmt: skip


def both(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: tuple(function(x))


def only(which: int) -> Callable[..., Any]:
    return lambda x: torch.topk(x, 2)[which]


@pytest.fixture(scope="module")
def built() -> Any:
    made = {}
    for name, (function, given, *_, strides) in CASES.items():
        body = trace(both(function), given)
        spec = topk.spec_of(body, operands_of(body, strides))
        assert spec is not None, name
        made[name] = (spec, topk.emit(spec))
    for which in (0, 1):  # only the values, only the indices
        body = trace(only(which), (("T", 8), f32))
        spec = topk.spec_of(body, operands_of(body))
        assert spec is not None
        made[f"only_{which}"] = (spec, topk.emit(spec))
    return made, library([source for _, source in made.values()])


def operands(spec: topk.TopkSpec, sizes: dict[str, int], x: Tensor) -> list[Tensor]:
    return [x, *(example(o, sizes, TORCH_DTYPES[o.dtype]) for _, _, o in spec.outputs)]


def inputs(shape: Sequence[Any], dtype: torch.dtype, strides: Any, tokens: int) -> list[Tensor]:
    """Return random values, values with many ties, and values with NaN and infinities."""
    sizes = [tokens if s == "T" else s for s in shape]
    found = [torch.randn(sizes).mul(100).to(dtype), torch.randint(0, 3, sizes).to(dtype)]
    if dtype.is_floating_point:
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])
        found.append(odd[torch.randint(0, 6, sizes)].to(dtype))
    if strides is None:
        return found
    room = [torch.zeros(sizes[0] * strides[0], dtype=dtype) for _ in found]
    views = [m.as_strided(sizes, strides) for m in room]
    return [v.copy_(x) for v, x in zip(views, found)]


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_a_stable_sort(name: str, built: Any) -> None:
    spec, source = built[0][name]
    _, (shape, dtype), dim, largest, k, strides = CASES[name]
    for tokens in (1, 2, 19):
        for x in inputs(shape, dtype, strides.get(0), tokens):
            tensors = operands(spec, {"T": tokens}, x)
            call(built[1], source, tensors, {"T": tokens}, split=3)
            seen = x[:, 3:9] if name == "part" else x
            want = torch.sort(seen, dim=dim, descending=largest, stable=True)
            for out, expected in zip(tensors[1:], want):
                torch.testing.assert_close(
                    out, expected.narrow(dim, 0, k), rtol=0, atol=0, equal_nan=True
                )
            for out, expected in zip(topk.reference(spec, x), tensors[1:]):
                torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_alone(which: int, built: Any) -> None:
    spec, source = built[0][f"only_{which}"]
    x = torch.randn(5, 8)
    tensors = operands(spec, {"T": 5}, x)
    call(built[1], source, tensors, {"T": 5})
    assert torch.equal(tensors[1], torch.topk(x, 2)[which])


def test_other_bodies_are_refused() -> None:
    for function, given in (
        (lambda x: x + 1, (("T", 9), f32)),
        (both(lambda x: torch.topk(x * 2, 2)), (("T", 9), f32)),
        (both(lambda x: torch.sort(x, dim=0)), (("T", 9), f32)),
        (both(lambda x: torch.topk(x, topk.MAX_K + 1)), (("T", topk.MAX_K + 1), f32)),
    ):
        body = trace(function, given)
        assert topk.spec_of(body, operands_of(body)) is None
