"""Expressions: built from ATen nodes with torch's promotion, printed, evaluated, compiled."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

from aios_compile.codegen.cpp import pointwise
from aios_compile.codegen.cpp.dialect import SCALAR, VECTOR
from aios_compile.codegen.expression import (
    Call,
    Const,
    Load,
    Printer,
    call,
    evaluate,
    formula,
    substitute,
)
from aios_compile.codegen.operand import Operand
from tests.codegen.kernels import operands_of, run, trace

OPS = (
    *("add", "sub", "mul", "div", "neg", "abs", "reciprocal", "rsqrt", "sqrt", "exp", "log", "sin"),
    *(
        "cos",
        "tanh",
        "erf",
        "sigmoid",
        "floor",
        "ceil",
        "trunc",
        "sign",
        "remainder",
        "fmod",
        "pow",
    ),
    *("floor_divide", "minimum", "maximum", "clamp", "where", "eq", "ne", "lt", "le", "gt", "ge"),
    *(
        "logical_and",
        "logical_or",
        "logical_not",
        "logical_xor",
        "isnan",
        "isinf",
        "log1p",
        "expm1",
    ),
    *("exp2", "log2", "log10", "atan2", "asin", "acos", "atan", "tan", "sinh", "cosh", "rsub"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "masked_fill", "addcmul", "lerp"),
    *("nn.functional.silu", "nn.functional.gelu", "nn.functional.relu", "nn.functional.elu"),
    *("nn.functional.leaky_relu", "nn.functional.softplus", "nn.functional.hardtanh"),
    *("nn.functional.mish", "nn.functional.hardswish", "nn.functional.logsigmoid", "square"),
)
DTYPES = (torch.float32, torch.int64, torch.bfloat16)


def samples(name: str, dtype: torch.dtype) -> list[tuple[Callable[..., Any], list[Tensor]]]:
    """Return (a function of tensors, the tensors) for OpInfo's first samples of an operator."""
    info = next(i for i in op_db if i.name == name)
    if dtype not in info.supported_dtypes("cpu"):
        return []
    found = []
    for sample in itertools.islice(info.sample_inputs("cpu", dtype, requires_grad=False), 3):
        flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
        tensors = [flat[i] for i in places]
        if any(t.numel() == 0 for t in tensors) or not tensors:
            continue

        def function(*xs: Tensor, flat: Any = flat, places: Any = places, spec: Any = spec) -> Any:
            values = list(flat)
            for place, x in zip(places, xs, strict=True):
                values[place] = x
            first, args, kwargs = tree_unflatten(values, spec)
            return info.op(first, *args, **kwargs)

        found.append((function, tensors))
    return found if "NIGHTLY" in os.environ else found[::3]


@pytest.mark.parametrize("name", OPS)
def test_expressions_equal_eager_on_opinfo_samples(name: str) -> None:
    ran = 0
    for dtype in DTYPES:
        for function, tensors in samples(name, dtype):
            body = trace(function, *((tuple(t.shape), t.dtype) for t in tensors))
            operands = operands_of(body)
            for i, t in enumerate(tensors):
                old = operands[i]
                operands[i] = Operand(old.name, old.dtype, old.shape, tuple(t.stride()))
            spec = pointwise.spec_of(body, operands)
            assert spec is not None, f"{name} {dtype}: {body.code}"
            (got,) = pointwise.reference(spec, *tensors)
            want = function(*tensors)
            assert got.dtype == want.dtype
            half = dtype == torch.bfloat16
            torch.testing.assert_close(
                got, want, rtol=2e-2 if half else 1e-5, atol=1e-2 if half else 1e-5, equal_nan=True
            )
            ran += 1
    assert ran > 0


UNARY_FLOAT = (
    *("neg", "abs", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p"),
    *("sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos", "atan", "erf", "sigmoid"),
    *("floor", "ceil", "round", "trunc", "sign", "isnan", "isinf", "reciprocal", "square"),
)
BINARY_FLOAT = ("atan2", "remainder", "fmod", "floor_divide", "minimum", "maximum", "pow", "eq")
WHOLE = ("remainder", "floor_divide", "minimum", "fmod", "bitwise_xor", "eq", "le", "mul")


def check_kernel(function: Callable[..., Any], *xs: Tensor) -> None:
    body = trace(function, *((tuple(x.shape), x.dtype) for x in xs))
    spec = pointwise.spec_of(body, operands_of(body))
    assert spec is not None
    wanted = function(*xs)
    outs = [torch.empty_like(w) for w in wanted]
    run(pointwise.emit(spec), [*xs, *outs], {})
    for k, (got, want) in enumerate(zip(outs, wanted, strict=True)):
        torch.testing.assert_close(
            got, want, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m, k=k: f"output {k}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_float_operation_compiles_and_equals_eager(dtype: torch.dtype) -> None:
    edges = [0.0, -0.0, 0.5, -2.5, 1.5, math.inf, -math.inf, math.nan, 1e30]
    x = torch.cat((torch.tensor(edges), torch.randn(41) * 3)).to(dtype)
    y = torch.cat((torch.randn(41), torch.tensor([2.0, -1.5, 3.0, 0.5, 1, 2, 3, 4, 5]))).to(dtype)
    if dtype == torch.float64:
        check_kernel(lambda x, y: (x + y, x * y - 1, x < y, torch.where(x > y, x, -y)), x, y)
        return
    check_kernel(lambda x: tuple(getattr(torch, name)(x) for name in UNARY_FLOAT), x)
    check_kernel(lambda x, y: tuple(getattr(torch, name)(x, y) for name in BINARY_FLOAT), x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_every_whole_operation_compiles_and_equals_eager(dtype: torch.dtype) -> None:
    x = torch.randint(-50, 50, (47,)).to(dtype)
    y = torch.randint(1, 7, (47,)).to(dtype) * torch.where(torch.arange(47) % 2 == 0, 1, -1).to(
        dtype
    )
    check_kernel(lambda x, y: tuple(getattr(torch, name)(x, y) for name in WHOLE), x, y)
    check_kernel(lambda x: (x.float() / 3, -x, x.abs(), ~x, x.to(torch.bool), x << 2), x)


def test_printing() -> None:
    x, y = Load(0), Load(1)
    silu = Call("silu", (x,))
    product = Call("mul", (silu, y))
    assert Printer(VECTOR).text(product, ["gate", "up"]) == "silu(gate) * up"
    assert Printer(VECTOR).text(call("max", (x, Const(0.5)), "f32"), ["x"]) == "max(x, splat(0.5f))"
    assert Printer(SCALAR).text(call("max", (x, Const(0.5)), "f32"), ["x"]) == "max(x, 0.5f)"
    twice = Call("add", (product, silu))
    lines, (result,) = Printer(VECTOR).statements([twice], ["g", "u"])
    assert lines == ["const vf v0 = silu(g);"] and result == "(v0 * u) + v0"
    assert formula(twice, ["g", "u"]) == "(silu(g) * u) + silu(g)"
    assert repr(twice) == repr(Call("add", (Call("mul", (Call("silu", (Load(0),)), y)), silu)))
    assert hash(twice) == hash(Call("add", (product, silu)))


def test_constants_are_exact_and_folded() -> None:
    for value in (0.1, -1e-30, 3.0, 1e30, math.inf, -math.inf, math.nan):
        text = Printer(SCALAR).text(Const(value), [])
        assert "e" in text or "." in text or "k" in text
    assert Printer(SCALAR).text(Const(0.1), []) == "0.1f"
    assert Const(0.0) != Const(-0.0) and Const(math.nan) == Const(math.nan)
    assert call("add", (Const(1.0), Const(2.0)), "f32") == Const(3.0)
    assert substitute(Call("neg", (Load(0),)), lambda e: Load(3) if e == Load(0) else None) == Call(
        "neg", (Load(3),)
    )


def test_half_precision_rounds_at_every_node() -> None:
    body = trace(lambda x, y: x * y + x, ((64,), torch.bfloat16), ((64,), torch.bfloat16))
    spec = pointwise.spec_of(body, operands_of(body))
    assert spec is not None
    (variant,) = spec.variants
    assert formula(variant.values[0], ["x", "y"]) == "bf16((bf16((x * y)) + x))"
    x, y = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    assert torch.equal(evaluate(variant.values[0], [x, y]).bfloat16(), x * y + x)


def test_an_unknown_operator_has_no_rule() -> None:
    from aios_compile.codegen.pointwise_ops import is_pointwise

    body = trace(lambda x: x.cumsum(0), ((5,), torch.float32))
    assert not any(is_pointwise(n) for n in body.graph.nodes if isinstance(n, fx.Node))
