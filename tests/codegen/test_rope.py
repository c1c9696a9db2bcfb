"""The rope kernel against its eager reference: both pairings, partial width, strides."""

from __future__ import annotations

import pytest
import torch

from aios_compile.codegen.cpp import rope
from aios_compile.ir import ops  # noqa: F401  (registers the ops)
from tests.codegen.harness import Kernel, make_body


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(64, 64), (20, 12), (6, 2), (80, 32)])
def test_rope_is_the_reference_bit_by_bit(width, rotated, interleaved):
    heads, row = 3, 3 * width + 7

    def function(x, cos, sin):
        return torch.ops.aios.rope.default(x, cos, sin, interleaved)

    inputs = {
        "x": (("T", heads, width), torch.float32),
        "cos": (("T", rotated), torch.float32),
        "sin": (("T", rotated), torch.float32),
    }
    body, operands = make_body(function, inputs, {"x": (row, width, 1)})
    spec = rope.spec_of(body, operands)
    assert spec is not None
    built = Kernel(rope.emit(spec))
    for tokens in (1, 2, 5):
        merged = torch.randn(tokens, row)
        x = merged.as_strided((tokens, heads, width), (row, width, 1))
        angles = torch.randn(tokens, rotated)
        cos, sin = angles.cos(), angles.sin()
        for splits in (1, 3):
            out = torch.full((tokens, heads, width), float("nan"))
            built({"T": tokens}, x, cos, sin, out, splits=splits)
            assert torch.equal(out, rope.reference(spec, x, cos, sin))


def test_other_bodies_are_not_rope():
    negate = torch.ops.aten.neg.default
    body, operands = make_body(lambda x: negate(x), {"x": (("T", 4), torch.float32)})
    assert rope.spec_of(body, operands) is None
