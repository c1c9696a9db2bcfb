"""Functions that Triton lacks, in the interpreter, against torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aios_compile.codegen.cpp import pointwise as cpp_pointwise
from tests.codegen.kernels import operands_of, trace
from tests.codegen.kernels import run as run_cpp
from tests.codegen.test_triton_emitters import load

pytest.importorskip("triton")

from aios_compile.codegen.triton import pointwise, row_reduction
from aios_compile.codegen.triton.compile_ahead import compile_ahead
from aios_compile.codegen.triton.functions import called_by, functions
from aios_compile.errors import CodegenError

ULP = torch.finfo(torch.float32).eps
EDGES = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 1.0, -1.0, 1e-30, -3e-6, 8388609.0, -4e9]
EDGES += [math.inf, -math.inf, math.nan]
FLOATS = (
    *("log10", "tan", "sinh", "cosh", "asin", "acos", "atan", "round", "trunc", "expm1", "log1p"),
    "tanh",
)
DIVISIONS = ("fmod", "remainder", "floor_divide", "div_trunc", "atan2")
FEW_ULP = {"expm1": 4.0, "log1p": 4.0, "tanh": 3.0}  # made of float32 functions


def run(function: Callable[..., Any], folder: Path, *tensors: Tensor) -> list[Tensor]:
    body = trace(function, *((tuple(t.shape), t.dtype) for t in tensors))
    reduces = pointwise.spec_of(body, operands_of(body)) is None
    emitter = row_reduction if reduces else pointwise
    spec = emitter.spec_of(body, operands_of(body))
    assert spec is not None
    results = body(*tensors)
    outs = [torch.empty_like(r) for r in results]
    load(emitter.emit(spec), folder).launch([*tensors, *outs], T=1)
    return outs


def close_in_ulps(got: Tensor, want: Tensor, ulps: float, name: str) -> None:
    """Relative to each value, not to the largest; infinities, NaN and zeros' signs as well."""
    single = want.float()
    whole = single.isfinite() & (single != 0)
    torch.testing.assert_close(got[~whole], single[~whole], rtol=0, atol=1e-45, equal_nan=True)
    error = ((got.double() - want).abs() / want.abs())[whole]
    assert float(error.max()) <= ulps * ULP, f"{name}: {float(error.max()) / ULP} ulp"


@pytest.fixture(scope="module")
def numbers() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = 10 ** torch.empty(400).uniform_(-6, 4)
    x = torch.cat([torch.tensor(EDGES), sizes * torch.randn(400).sign(), torch.rand(200) * 2 - 1])
    y = torch.cat([torch.tensor([3.0, -0.1, 1e-3, math.inf]), sizes.flip(0), torch.randn(212)])
    return x, y


def test_functions_of_one_number(numbers: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x, _ = numbers
    found = run(lambda x: tuple(getattr(torch, name)(x) for name in FLOATS), tmp_path, x)
    for name, got in zip(FLOATS, found, strict=True):
        want = getattr(torch, name)(x.double())
        close_in_ulps(got, want, FEW_ULP.get(name, 1.0), name)


def test_functions_of_two_numbers(numbers: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """A quotient near a whole number, or of 200 bits, has its exact remainder."""
    x, y = numbers

    def all_of(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        ops = torch.fmod, torch.remainder, torch.floor_divide, torch.atan2
        return (*(op(x, y) for op in ops[:3]), torch.div(x, y, rounding_mode="trunc"), ops[3](x, y))

    x = torch.cat([x, torch.tensor([9.0, 0.3, 7e37, -7e37, 1.0, -0.0, 0.0, 5.0])])
    y = torch.cat([y, torch.tensor([3.0, 0.1, 3e-38, 0.7, 0.0, -0.0, -0.0, math.inf])])
    found = run(all_of, tmp_path, x, y)
    wide = all_of(x.double(), y.double())
    for name, got, want, eager in zip(DIVISIONS, found, wide, all_of(x, y), strict=True):
        if name in ("floor_divide", "div_trunc"):  # a whole number decided by a rounding
            unsure = (want.float() != eager) & (want - eager).abs().le(1)
            got, want = got[~unsure], want[~unsure]
        close_in_ulps(got, want, 1.0, name)


def test_floor_divide_is_torchs_at_the_borders(tmp_path: Path) -> None:
    """-1 / inf was NaN; zeros have torch's signs, infinities and huge quotients its values."""
    values = [0.0, -0.0, 1.0, -1.0, 2.5, -7.0, 1e-30, -3e38, 1e38, math.inf, -math.inf, math.nan]
    x, y = (t.flatten() for t in torch.meshgrid(*[torch.tensor(values)] * 2, indexing="ij"))
    want = torch.stack([torch.floor_divide(a, b) for a, b in zip(x, y)])  # one at a time: exact
    (ours,) = run(lambda x, y: (torch.floor_divide(x, y),), tmp_path, x, y)
    body = trace(torch.floor_divide, *[(tuple(x.shape), x.dtype)] * 2)
    spec = cpp_pointwise.spec_of(body, operands_of(body))
    assert spec is not None
    run_cpp(cpp_pointwise.emit(spec), [x, y, native := torch.empty_like(x)], {})
    for got in (ours, native):
        torch.testing.assert_close(got, want, rtol=2 * ULP, atol=0, equal_nan=True)
        zeros = want == 0
        assert torch.equal(got[zeros].signbit(), want[zeros].signbit())


def test_functions_of_whole_numbers(tmp_path: Path) -> None:
    x = torch.tensor([7, -7, 7, -7, 0, 2**40 + 1, -(2**62), 5, -1, 3])
    y = torch.tensor([2, 2, -2, -2, 3, 1000, 7, 0, 63, 41])

    def all_of(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        power = torch.pow(x, y.abs())
        ops = torch.fmod, torch.remainder, torch.floor_divide
        return (*(op(x, y) for op in ops), torch.div(x, y, rounding_mode="trunc"), power)

    kept = y != 0
    found = run(all_of, tmp_path, x, torch.where(kept, y, 1))
    for got, want in zip(found, all_of(x, torch.where(kept, y, 1)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    body = trace(all_of, ((10,), torch.int64), ((10,), torch.int64))
    spec = pointwise.spec_of(body, operands_of(body))
    assert spec is not None
    outs = [torch.empty_like(x) for _ in range(5)]
    load(pointwise.emit(spec), tmp_path).launch([x, y, *outs], T=1)
    assert [int(out[7]) for out in outs] == [0, 0, 0, 0, 1]  # by zero: no trap


def test_products_and_flags_of_rows(tmp_path: Path) -> None:
    x = torch.randn(5, 37)
    got = run(lambda x: (x.prod(1), (x > 2).any(1), (x > -2).all(1)), tmp_path, x)
    torch.testing.assert_close(got[0], x.prod(1))
    assert torch.equal(got[1], (x > 2).any(1)) and torch.equal(got[2], (x > -2).all(1))


def test_a_nan_is_the_largest_and_the_smallest_of_its_row(tmp_path: Path) -> None:
    x = torch.randn(3, 20)
    x[1, 4] = x[2, 0] = math.nan
    got = run(lambda x: (x.amax(1), x.amin(1), x.softmax(1)), tmp_path, x)
    for mine, eager in zip(got, (x.amax(1), x.amin(1), x.softmax(1)), strict=True):
        torch.testing.assert_close(mine, eager, equal_nan=True)


def test_a_flag_of_a_number_meets_flags_of_a_row(tmp_path: Path) -> None:
    """Found by number 102 of the fuzzer's programs on Triton."""
    x, y = torch.randn(40), torch.randn(())

    def all_of(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        ops = torch.bitwise_xor, torch.bitwise_and, torch.bitwise_or
        return tuple(op(x > 0.1, y < 0.5) for op in ops)

    for got, want in zip(run(all_of, tmp_path, x, y), all_of(x, y), strict=True):
        assert torch.equal(got, want)


def test_rounding_to_decimals(tmp_path: Path) -> None:
    x = torch.randn(50) * 100
    got = run(lambda x: (x.round(decimals=2), x.round(decimals=-1)), tmp_path, x)
    assert torch.equal(got[0], x.round(decimals=2)) and torch.equal(got[1], x.round(decimals=-1))


def test_a_module_has_what_it_calls_and_no_more() -> None:
    names = [next(n for n, t in functions().items() if t == x) for x in called_by(["arcsine(x)"])]
    assert names == ["angle_of", "arcsine"]
    assert called_by(["def tanh(x):\n    return tanh(x)"]) == []


def test_double_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CodegenError, match="log10 in float64"):
        run(lambda x: (x.log10(),), tmp_path, torch.randn(5).double())


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_functions_compile_for_cards(target: str, tmp_path: Path) -> None:
    f32, i64 = torch.float32, torch.int64

    def all_of(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, ...]:
        two = torch.fmod, torch.remainder, torch.floor_divide, torch.pow
        ones = (getattr(torch, name)(x) for name in FLOATS)
        return (*ones, *(op(x, y) for op in two), *(op(i, j) for op in two), torch.atan2(x, y))

    body = trace(all_of, ((64,), f32), ((64,), f32), ((64,), i64), ((64,), i64))
    rows = trace(lambda x: (x.prod(1), (x > 2).any(1), x.amax(1)), ((5, 37), f32))
    specs = (
        pointwise.spec_of(body, operands_of(body)),
        row_reduction.spec_of(rows, operands_of(rows)),
    )
    assert specs[0] is not None and specs[1] is not None
    sources = [pointwise.emit(specs[0]), row_reduction.emit(specs[1])]
    assert all(compile_ahead(sources, target, tmp_path))
