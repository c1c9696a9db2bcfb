"""The quantised embedding: every format, bit for bit; ids outside of the table are clamped."""

from __future__ import annotations

import pytest
import torch

from aios_compile.codegen.cpp import quantized_embedding
from aios_compile.codegen.packing import pack_quant16
from aios_compile.ir import ops
from aios_compile.ir.quant_format import QuantFormat
from tests.codegen.harness import Kernel, make_body
from tests.codegen.test_quantized_linear import random_rows
from tests.ir.test_quantized import FORMATS

assert ops.TABLE
aios = torch.ops.aios
ROWS, DEPTH = 37, 512


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format(name: str) -> None:
    form = QuantFormat.parse(name)
    inputs = {
        "rows": ((ROWS, form.row_bytes(DEPTH)), torch.uint8),
        "ids": (("T",), torch.int64),
    }

    def function(rows, ids):
        return aios.quantized_embedding.default(rows, ids, name)

    body, operands = make_body(function, inputs, packed={"rows": f"quant16.{name}"})
    spec = quantized_embedding.spec_of(body, operands)
    assert spec is not None
    kernel = Kernel(quantized_embedding.emit(spec))
    rows = random_rows(name, ROWS, DEPTH)
    table = pack_quant16(rows.numpy(), form)
    ids = torch.tensor([0, 36, 5, 16, 15, 5, 31, 32, -1, 37, 1 << 40])
    expected = quantized_embedding.reference(spec, rows, ids.clamp(0, ROWS - 1))
    for splits in (1, 3):
        out = torch.full((len(ids), DEPTH), torch.nan)
        kernel({"T": len(ids)}, table, ids, out, splits=splits)
        assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


def test_other_bodies_are_left_to_others() -> None:
    inputs = {"rows": ((ROWS, 68), torch.uint8), "ids": (("T",), torch.int64)}

    def scaled(rows, ids):
        return aios.quantized_embedding.default(rows, ids, "int8_g32_f16") * 2

    packed = {"rows": "quant16.int8_g32_f16"}
    assert quantized_embedding.spec_of(*make_body(scaled, inputs, packed=packed)) is None

    def plain(rows, ids):
        return aios.quantized_embedding.default(rows, ids, "int8_g32_f16")

    assert quantized_embedding.spec_of(*make_body(plain, inputs)) is None  # not packed
    table = {"ids": (("T", 2), torch.int64)}
    assert quantized_embedding.spec_of(*make_body(plain, inputs | table, packed=packed)) is None
