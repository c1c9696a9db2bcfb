"""The Triton emitters in the interpreter, on the specs that the C++ emitters get."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aios_compile.codegen.expression import TORCH_DTYPES
from aios_compile.codegen.source import KernelSource
from tests.codegen.kernels import example, operands_of, trace

pytest.importorskip("triton")

from aios_compile.codegen.triton import pointwise, row_reduction

f32, f16, i64 = torch.float32, torch.float16, torch.int64
Inputs = Sequence[tuple[Sequence[Any], torch.dtype]]

POINTWISE: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "swiglu": (lambda g, u: F.silu(g) * u, [(("T", 70), f32), (("T", 70), f32)]),
    "gelu_bias": (lambda x, b: F.gelu(x + b), [(("T", 3, 33), f32), ((33,), f32)]),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh") - 1, [(("T", 33), f32)]),
    "rotate_half": (lambda x: torch.cat((-x[..., 8:], x[..., :8]), -1), [(("T", 2, 16), f32)]),
    "angles": (lambda p, f: (p[:, None] * f).cos(), [(("T",), i64), ((33,), f32)]),
    "where_clamp": (lambda x: torch.where(x > 0, x.clamp(max=1.0), x * 2), [(("T", 33), f32)]),
    "pow": (
        lambda x, y: (x.abs() + 0.1) ** y + x**5.0 - x**4.0,
        [(("T", 33), f32), (("T", 33), f32)],
    ),
    "half": (lambda x, y: x * y + x, [(("T", 40), f16), (("T", 40), f16)]),
    "gather": (lambda ids, w: w[ids] * 2, [(("T",), i64), ((40, 20), f32)]),
    "one column more than a block": (lambda x: x * 2, [(("T", 1025), f32)]),
}
REDUCTIONS: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "rms_norm": (
        lambda x, w: torch.ops.aios.rms_norm(x, w, 1e-6, False),
        [(("T", 70), f32), ((70,), f32)],
    ),
    "add_layer_norm": (
        lambda x, r, w, b: (x + r, torch.ops.aios.layer_norm(x + r, w, b, 1e-6)),
        [(("T", 70), f32), (("T", 70), f32), ((70,), f32), ((70,), f32)],
    ),
    "softmax": (lambda x: torch.softmax(x * 2, -1), [(("T", 3, 33), f32)]),
    "half_norm": (
        lambda x, w: torch.ops.aios.rms_norm(x, w, 1e-6, False),
        [(("T", 70), f16), ((70,), f16)],
    ),
    "argmax_max": (lambda x: (x.argmax(-1), x.amax(-1)), [(("T", 33), f32)]),
    "sum_of_columns": (lambda x: x.sum(0), [((7, "T"), f32)]),
}


def load(source: KernelSource, folder: Path) -> ModuleType:
    path = folder / f"{source.symbol}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(source.symbol, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(
    emitter: ModuleType, function: Callable[..., Any], inputs: Inputs, tokens: int, folder: Path
) -> None:
    body = trace(function, *inputs)
    operands = operands_of(body)
    spec = emitter.spec_of(body, operands)
    assert spec is not None
    module = load(emitter.emit(spec), folder)
    sizes = {"T": tokens}
    tensors = [example(o, sizes, TORCH_DTYPES[o.dtype], seed) for seed, o in enumerate(operands)]
    xs, outs = tensors[: len(inputs)], tensors[len(inputs) :]
    module.launch([*xs, *outs], T=tokens)
    result = body(*xs)
    wanted: Sequence[Tensor] = result if isinstance(result, (tuple, list)) else [result]
    for got, want in zip(outs, wanted, strict=True):
        half = want.dtype == f16
        torch.testing.assert_close(
            got, want, rtol=2e-3 if half else 1e-5, atol=2e-3 if half else 2e-5
        )


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_kernels_give_the_value_of_eager(name: str, tokens: int, tmp_path: Path) -> None:
    check(pointwise, *POINTWISE[name], tokens, tmp_path)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_row_reductions_give_the_value_of_eager(name: str, tokens: int, tmp_path: Path) -> None:
    check(row_reduction, *REDUCTIONS[name], tokens, tmp_path)
