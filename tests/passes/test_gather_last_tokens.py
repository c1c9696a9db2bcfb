"""gather_last_tokens: fires, what moves to R rows, near misses, numerics, a second run."""

# ruff: noqa: F722, F821, UP037  (annotations are shapes)
from __future__ import annotations

from typing import Any

import pytest
import torch

from aios_compile.errors import PassError
from aios_compile.ir.module import IRModule, outputs
from aios_compile.passes.gather_last_tokens import gather_last_tokens
from tests.passes import helpers, level2

aios = torch.ops.aios
aten = torch.ops.aten
ROWS = torch.tensor([6, 0, 4])


def check(example: Any) -> IRModule:
    """Apply the pass once; the result must be the rows of the dense result, in float32."""
    module = helpers.trace(example)
    (dense,) = helpers.evaluate(module)
    assert helpers.apply(gather_last_tokens, module).total == 1
    (rows,) = helpers.evaluate(module, {"logit_rows": ROWS})
    helpers.assert_same([dense.reshape(-1, dense.shape[-1])[ROWS]], [rows])
    value = outputs(module.root.graph)[0].meta["val"]
    assert value.dtype == torch.float32 and value.dim() == 2
    assert helpers.apply(gather_last_tokens, module).total == 0
    return module


def test_norm_head_and_soft_cap_work_on_the_rows() -> None:
    def f(x: "f32[T, 64]", n: "weight f32[64]", w: "weight f32[99, 64]") -> Any:
        y = aios.linear(aios.rms_norm(x, n, 1e-6, True), w)
        return torch.tanh(y / 30.0) * 30.0

    assert helpers.targets(check(f))[:3] == ["index_select", "aios.rms_norm", "aios.linear"]


def test_a_batch_dimension_goes_and_half_precision_is_widened() -> None:
    def f(x: "bf16[1, T, 64]", n: "weight bf16[64]", w: "weight bf16[99, 64]") -> Any:
        return aios.linear(aios.rms_norm(x, n, 1e-6, True), w)

    module = check(f)
    assert helpers.targets(module) == [
        *("index_select", "aios.rms_norm", "aios.linear", "squeeze", "_to_copy")
    ]


def test_views_of_the_rows_are_followed() -> None:
    def f(x: "f32[1, T, 64]", w: "weight f32[99, 64]") -> Any:
        y = torch.mm(x.reshape(-1, 64), w.t())
        return y.reshape(1, -1, 99)

    assert helpers.targets(check(f)).count("index_select") == 1


def test_both_terms_of_the_last_residual_are_gathered() -> None:
    def f(x: "f32[T, 64]", w: "weight f32[64, 64]", h: "weight f32[99, 64]") -> Any:
        y = x.cumprod(0) + aios.linear(x, w)
        return aios.linear(y, h)

    names = helpers.targets(check(f))
    assert names.count("index_select") == 2
    assert names.index("cumprod") < names.index("index_select") < names.index("aios.linear")


def test_a_value_with_another_user_stays_whole() -> None:
    def f(x: "f32[T, 64]", n: "weight f32[64]", w: "weight f32[99, 64]") -> Any:
        h = aios.rms_norm(x, n, 1e-6, True)
        return aios.linear(h, w), h

    module = helpers.trace(f)
    assert helpers.apply(gather_last_tokens, module).total == 1
    assert helpers.targets(module) == ["aios.rms_norm", "index_select", "aios.linear"]


def test_rows_are_gathered_after_the_last_layer() -> None:
    module = level2.program()
    assert helpers.apply(gather_last_tokens, module).hits == {"layer": 0, "": 1}
    assert helpers.targets(module)[-3:] == ["index_select", "aios.rms_norm", "aios.linear"]
    assert module.inputs["logit_rows"] == "logit_rows"


def test_logits_without_tokens_are_refused() -> None:
    def f(w: "weight f32[9, 64]") -> Any:
        return w * 2

    applied = helpers.apply(gather_last_tokens, helpers.trace(f))
    assert applied.total == 0 and applied.refusals == ("the logits have no token axis",)


def test_logits_that_are_no_matrix_are_an_error() -> None:
    def f(x: "f32[3, T, 64]", w: "weight f32[99, 64]") -> Any:
        return aios.linear(x, w)

    with pytest.raises(PassError, match="expected one row of the vocabulary a token"):
        helpers.apply(gather_last_tokens, helpers.trace(f))
