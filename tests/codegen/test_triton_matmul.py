"""The generic Triton product in the interpreter: the C++ emitter's cases, and half precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from aios_compile.codegen.expression import TORCH_DTYPES
from tests.codegen.kernels import example, operands_of, trace
from tests.codegen.test_matmul import CASES, Inputs
from tests.codegen.triton_modules import load, run

pytest.importorskip("triton")

from aios_compile.codegen.triton import matmul

bf16, f16 = torch.bfloat16, torch.float16
HALVES: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "f16": (lambda x, w: x @ w, [(("T", 70), f16), ((70, 33), f16)]),
    "bf16": (lambda x, w: x @ w, [(("T", 70), bf16), ((70, 33), bf16)]),
}


@pytest.mark.parametrize("name", [*CASES, *HALVES])
def test_kernel_equals_eager(name: str) -> None:
    function, inputs = {**CASES, **HALVES}[name]
    body = trace(function, *inputs)
    spec = matmul.spec_of(body, operands_of(body))
    assert spec is not None
    source = matmul.emit(spec)
    module = load(source)
    half = spec.operands[-1].dtype != "f32"
    for tokens in (1, 5, 37):
        tensors: Sequence[torch.Tensor] = [
            example(o, {"T": tokens}, TORCH_DTYPES[o.dtype], i) for i, o in enumerate(spec.operands)
        ]
        *xs, out = tensors
        want = body(*(x.float() for x in xs)) if half else body(*xs)
        run(source, module, [*xs, out], T=tokens)
        tolerance = {"rtol": 1e-2, "atol": 5e-2} if half else {"rtol": 1e-5, "atol": 5e-5}
        torch.testing.assert_close(out.float(), want.float(), **tolerance)
