"""Triton paged attention in the interpreter: mixed batches, masks, splits, invariance, padding."""

from __future__ import annotations

import functools

import pytest
import torch

from aios_compile.ir import ops  # noqa: F401  (registers the ops)
from tests.codegen.harness import make_body
from tests.codegen.test_paged_attention import MIXED, PAGE, Batch

pytest.importorskip("triton")

from aios_compile.codegen.triton import paged_attention
from tests.codegen.triton_kernels import Kernel

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
SHAPE = (4, 2, 24, 40)


@functools.cache
def kernel(heads, kv_heads, width, v_width, dtype, segment=256, whole=False, **options):
    """Return the spec and the loaded kernel; `segment` keys a segment, `whole`: never split."""
    options = dict(options)
    sinks = options.get("sinks", False)

    def body(q, k_cache, v_cache, starts, lengths, tables, *rest):
        return torch.ops.aios.paged_attention.default(
            q, k_cache, v_cache, starts, lengths, tables, 0.3, options.get("window"),
            options.get("softcap"), options.get("chunk"), rest[0] if sinks else None,
        )  # fmt: skip

    def plain(q, k_cache, v_cache, starts, lengths, tables):
        return body(q, k_cache, v_cache, starts, lengths, tables)

    def with_sinks(q, k_cache, v_cache, starts, lengths, tables, sinks):
        return body(q, k_cache, v_cache, starts, lengths, tables, sinks)

    row = (heads + 2 * kv_heads) * width
    inputs = {
        "q": (("T", heads, width), f32),
        "k_cache": ((40, kv_heads, width, PAGE), dtype),
        "v_cache": ((40, kv_heads, PAGE, v_width), dtype),
        "starts": ((6,), torch.int64),
        "lengths": (("S",), torch.int64),
        "tables": (("S", 6), torch.int64),
    }
    if sinks:
        inputs["sinks"] = ((heads,), f32)
    function = with_sinks if sinks else plain
    graph, operands = make_body(function, inputs, {"q": (row, width, 1)})
    spec = paged_attention.spec_of(graph, operands)
    assert spec is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "SEGMENT", segment)
        patch.setattr(paged_attention, "WHOLE_ROWS", 16)
        patch.setattr(paged_attention, "PROGRAMS", 6)  # fewer than there are units
        if whole:
            patch.setattr(paged_attention, "MAX_SPLIT_TOKENS", 1)
        return spec, Kernel(paged_attention.emit(spec))


def run(built: Kernel, batch: Batch, sinks: bool = False) -> torch.Tensor:
    out = torch.full(batch.shape, float("nan"))
    built({"T": batch.shape[0], "S": len(batch.lengths), "P": 6}, *batch.arguments(sinks), out)
    return out


def check(shape, dtype, tolerance, **options) -> None:
    spec, built = kernel(*shape, dtype, **options)
    batch = Batch(MIXED, *shape, dtype)
    sinks = options.get("sinks", False)
    expected = paged_attention.reference(spec, *batch.arguments(sinks))
    torch.testing.assert_close(run(built, batch, sinks), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance", "segment", "whole"),
    [
        ((3, 1, 20, 13), f32, 2e-5, 32, False),
        ((3, 1, 20, 13), f32, 2e-5, 256, False),
        ((4, 2, 32, 32), f16, 3e-3, 32, False),
        ((4, 2, 32, 32), f16, 3e-3, 32, True),
        (SHAPE, bf16, 2e-2, 32, False),
    ],
    ids=str,
)
def test_mixed_batch_is_the_reference(shape, dtype, tolerance, segment, whole) -> None:
    check(shape, dtype, tolerance, segment=segment, whole=whole)


@pytest.mark.parametrize(
    ("options", "whole"),
    [({"window": 1}, False), ({"window": 19}, True), ({"chunk": 24}, False), ({"chunk": 24}, True),
     ({"softcap": 5.0}, False), ({"sinks": True}, True),
     ({"window": 20, "softcap": 2.0, "sinks": True}, False)],
    ids=str,
)  # fmt: skip
def test_masks_softcap_sinks(options, whole) -> None:
    check(SHAPE, f32, 2e-5, segment=32, whole=whole, **options)


@pytest.mark.parametrize("options", [{}, {"window": 19}], ids=str)
def test_a_row_does_not_depend_on_batch_chunk_or_split(options) -> None:
    _, split = kernel(*SHAPE, f32, segment=32, **options)
    _, whole = kernel(*SHAPE, f32, segment=32, whole=True, **options)
    batch = Batch(MIXED, *SHAPE, f32)
    result = run(split, batch)
    assert torch.equal(result, run(whole, batch))
    for s, (new, context) in enumerate(MIXED):  # some tokens as a step of their own
        first = int(batch.starts[s])
        for t in {0, new - 1}:
            alone = Batch(((1, 1),), *SHAPE, f32)
            alone.q, alone.k, alone.v = batch.q[first + t :][:1], batch.k, batch.v
            alone.tables = batch.tables[s : s + 1]
            alone.lengths = torch.tensor([context - new + t + 1])
            assert torch.equal(run(split, alone)[0], result[first + t])


@pytest.mark.parametrize("whole", [False, True])
def test_padding_tokens_get_zeros(whole) -> None:
    _, built = kernel(*SHAPE, f32, whole=whole)
    batch = Batch(((3, 3), (2, 20)), *SHAPE, f32)
    batch.starts = torch.tensor([0, 3, 3])  # tokens 3 and 4 belong to nobody
    out = run(built, batch)
    assert torch.equal(out[3:], torch.zeros_like(out[3:])) and out[:3].isfinite().all()
