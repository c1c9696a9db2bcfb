"""Embedding rows from row-major and packed tables; ids out of range stay inside the table."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aios_compile.codegen.cpp import embedding
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.packing import pack
from tests.codegen.kernels import operands_of, run, trace

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def packed(table: Tensor, layout: str) -> Tensor:
    """Return a [N, K] table in a layout of codegen/packing.py."""
    wide = table if table.dtype == torch.float32 else table.view(torch.int16)
    kind = np.float32 if table.dtype == torch.float32 else np.uint16
    array = pack(wide.numpy().view(kind), layout).view(wide.numpy().dtype)
    return torch.from_numpy(np.ascontiguousarray(array)).view(table.dtype)


@pytest.mark.parametrize(
    ("dtype", "layout", "width"),
    [
        *itertools.product(DTYPES, ["row_major", "rows16"], [50]),
        ("bf16", "pairs16", 50),
        ("bf16", "pairs16", 51),
    ],
)
def test_rows_equal_eager(dtype: str, layout: str, width: int) -> None:
    body = trace(
        lambda ids, table: F.embedding(ids, table).float() * 2.5,
        (("T",), torch.int64),
        ((37, width), DTYPES[dtype]),
    )
    operands = operands_of(body)
    if layout != "row_major":
        ids, table, out = operands
        operands = [ids, Operand(table.name, dtype, table.shape, table.strides, layout), out]
    spec = embedding.spec_of(body, operands)
    assert spec is not None
    source = embedding.emit(spec)
    table = torch.randn(37, width).to(DTYPES[dtype])
    stored = table if layout == "row_major" else packed(table, layout)
    for tokens in (1, 5):
        ids = torch.randint(0, 37, (tokens,))
        out = torch.full((tokens, width), 7.0)
        run(source, [ids, stored, out], {"T": tokens}, split=2)
        want = body(ids, table)
        assert torch.equal(out, want)
        assert torch.equal(embedding.reference(spec, ids, stored)[0], want)


def test_ids_out_of_the_vocabulary_are_clamped() -> None:
    """The admission point refuses them; the kernel still never reads outside the table."""
    body = trace(lambda i, w: F.embedding(i, w), (("T",), torch.int64), ((7, 50), torch.float32))
    spec = embedding.spec_of(body, operands_of(body))
    assert spec is not None
    table, out = torch.randn(7, 50), torch.empty(3, 50)
    run(embedding.emit(spec), [torch.tensor([-5, 2**40, 3]), table, out], {"T": 3})
    assert torch.equal(out, table[[0, 6, 3]])


def test_a_body_without_a_lookup_is_refused() -> None:
    body = trace(lambda x: x + 1, (("T", 5), torch.float32))
    assert embedding.spec_of(body, operands_of(body)) is None
