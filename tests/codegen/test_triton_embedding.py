"""The Triton embedding in the interpreter: dtypes, a tail, ids out of range, odd widths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aios_compile.codegen.operand import Operand
from tests.codegen.kernels import operands_of, trace
from tests.codegen.triton_modules import load, poisoned, run

pytest.importorskip("triton")

from aios_compile.codegen.triton import embedding

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_eager(dtype: str) -> None:
    body = trace(
        lambda ids, table: F.embedding(ids, table).float() * 2.5,
        (("T",), torch.int64),
        ((37, 1051), DTYPES[dtype]),  # a row needs two programs
    )
    spec = embedding.spec_of(body, operands_of(body))
    assert spec is not None
    source = embedding.emit(spec)
    module, table = load(source), torch.randn(37, 1051).to(DTYPES[dtype])
    for tokens in (1, 5):
        ids, out = torch.randint(0, 37, (tokens,)), poisoned((tokens, 1051))
        run(source, module, [ids, table, out], T=tokens)
        assert torch.equal(out, body(ids, table))
        assert torch.equal(embedding.reference(spec, ids, table)[0], out)


def test_ids_out_of_the_vocabulary_are_clamped() -> None:
    body = trace(lambda i, w: F.embedding(i, w), (("T",), torch.int64), ((7, 50), torch.float32))
    spec = embedding.spec_of(body, operands_of(body))
    assert spec is not None
    source, table, out = embedding.emit(spec), torch.randn(7, 50), poisoned((3, 50))
    run(source, load(source), [torch.tensor([-5, 2**40, 3]), table, out], T=3)
    assert torch.equal(out, table[[0, 6, 3]])


def test_a_packed_table_is_refused() -> None:
    body = trace(lambda i, w: F.embedding(i, w), (("T",), torch.int64), ((7, 50), torch.float32))
    ids, table, out = operands_of(body)
    packed = Operand(table.name, "f32", table.shape, table.strides, "rows16")
    assert embedding.spec_of(body, [ids, packed, out]) is None
