"""The generic matrix product against eager: strides, batches, T on every dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from aios_compile.codegen.cpp import matmul
from aios_compile.codegen.expression import TORCH_DTYPES
from tests.codegen.kernels import call, example, library, operands_of, trace

f32, bf16 = torch.float32, torch.bfloat16
Inputs = Sequence[tuple[Sequence[Any], torch.dtype]]
CASES: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "mm": (lambda x, w: x @ w, [(("T", 70), f32), ((70, 33), f32)]),
    "mm_transposed": (lambda x, w: x @ w.t(), [(("T", 70), f32), ((33, 70), f32)]),
    "wide": (lambda x, w: x @ w, [(("T", 9), f32), ((9, 600), f32)]),
    "scores": (
        lambda q, k: torch.bmm(q.permute(1, 0, 2), k.permute(1, 2, 0)),
        [(("T", 4, 16), f32), (("T", 4, 16), f32)],
    ),
    "values": (lambda p, v: torch.bmm(p, v), [((4, "T", "T"), f32), ((4, "T", 16), f32)]),
    "addmm": (
        lambda x, w, b: torch.addmm(b, x, w, alpha=2, beta=0.5),
        [(("T", 70), f32), ((70, 33), f32), ((33,), f32)],
    ),
    # One k: a lane past the end read the same element, and the sum was 16 times too large.
    "one_product": (lambda x, w: x @ w, [(("T", 1), f32), ((1, 1), f32)]),
    "expanded": (lambda x, w: x.expand(-1, 5) @ w.t(), [(("T", 1), f32), ((3, 5), f32)]),
    "bf16_weight": (lambda x, w: x @ w.float().t(), [(("T", 70), f32), ((33, 70), bf16)]),
}


@pytest.fixture(scope="module")
def built() -> Any:
    made = {}
    for name, (function, inputs) in CASES.items():
        body = trace(function, *inputs)
        spec = matmul.spec_of(body, operands_of(body))
        assert spec is not None, name
        made[name] = (body, spec, matmul.emit(spec))
    return made, library([source for _, _, source in made.values()])


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_eager_and_reference(name: str, built: Any) -> None:
    body, spec, source = built[0][name]
    for tokens in (1, 5, 37):
        sizes = {"T": tokens}
        *xs, out = (
            example(o, sizes, TORCH_DTYPES[o.dtype], i) for i, o in enumerate(spec.operands)
        )
        want = body(*xs)
        call(built[1], source, [*xs, out], sizes, split=3)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(matmul.reference(spec, *xs)[0], want, rtol=1e-5, atol=2e-5)
        whole = torch.empty_like(out)
        call(built[1], source, [*xs, whole], sizes)
        assert torch.equal(whole, out)


@pytest.mark.parametrize("name", ["mm", "mm_transposed"])
def test_a_row_does_not_depend_on_the_other_rows(name: str, built: Any) -> None:
    _, spec, source = built[0][name]
    x, w, out = (example(o, {"T": 37}, f32, i) for i, o in enumerate(spec.operands))
    call(built[1], source, [x, w, out], {"T": 37})
    alone = torch.empty(1, 33)
    call(built[1], source, [x[9:10], w, alone], {"T": 1})
    assert torch.equal(alone[0], out[9])


def test_other_bodies_are_refused() -> None:
    for function, inputs in (
        (lambda x: x + 1, [(("T", 9), f32)]),
        (lambda x, w: (x + 1) @ w, [(("T", 9), f32), ((9, 5), f32)]),
        (lambda x, w: x @ w, [(("T", 9), torch.int64), ((9, 5), torch.int64)]),
    ):
        body = trace(function, *inputs)
        assert matmul.spec_of(body, operands_of(body)) is None
