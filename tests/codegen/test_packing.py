"""Packing in blocks of 16 rows: layout, tails, NaN and Inf by name, time and memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from aios_compile.codegen.packing import (
    check_finite,
    has_halves,
    in_order,
    kind_of,
    pack,
    pack_pairs16,
    pack_quant16,
    pack_rows16,
    unpack_pairs16,
    unpack_quant16,
    unpack_rows16,
    with_halves,
)
from aios_compile.errors import CheckpointError
from aios_compile.ir import quantized
from aios_compile.ir.quant_format import QuantFormat
from tests.ir.test_quantized import FORMATS, random_fields

FORM = QuantFormat.parse("int4_g32_f16")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (16, 3), (17, 5), (40, 33), (600, 700)])
def test_layout_and_round_trip(rows, depth, dtype):
    w = (np.arange(rows * depth) % 30000).reshape(rows, depth).astype(dtype)
    if dtype == np.float16:
        w %= 1000
    packed = pack_rows16(w)
    assert packed.shape == (-(-rows // 16), depth, 16) and packed.flags.c_contiguous
    for n in {0, rows // 2, rows - 1}:
        assert np.array_equal(packed[n // 16, :, n % 16], w[n])
    assert not packed[-1, :, (rows - 1) % 16 + 1 :].any()
    assert np.array_equal(unpack_rows16(packed, rows), w)


@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (16, 3), (17, 6), (600, 701)])
def test_pairs_lie_side_by_side(rows, depth):
    w = (np.arange(rows * depth) % 30000).reshape(rows, depth).astype(np.uint16)
    packed = pack_pairs16(w)
    assert packed.shape == (-(-rows // 16), -(-depth // 2), 16, 2) and packed.flags.c_contiguous
    for n in {0, rows // 2, rows - 1}:
        for k in {0, depth // 2, depth - 1}:
            assert packed[n // 16, k // 2, n % 16, k % 2] == w[n, k]
    assert depth % 2 == 0 or not packed[:, -1, :, 1].any()
    assert np.array_equal(unpack_pairs16(packed, rows, depth), w)
    w[rows - 1, depth - 1] = 0x7F80
    with pytest.raises(CheckpointError, match=rf"mlp\.up: .*first at \[{rows - 1}, {depth - 1}\]"):
        pack_pairs16(w, "mlp.up")


def test_strided_input():
    w = np.random.default_rng(0).standard_normal((48, 20)).astype(np.float32)
    assert np.array_equal(pack_rows16(w.T), pack_rows16(np.ascontiguousarray(w.T)))


@pytest.mark.parametrize("row", [0, 100, 999])
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_bad_values_are_named(row, bits):
    w = np.full((1000, 300), 0x3F80, np.uint16)
    w[row, 7] = bits
    with pytest.raises(CheckpointError, match=rf"mlp\.up: .*first at \[{row}, 7\]"):
        pack_rows16(w, "mlp.up")
    wide = (w.astype(np.uint32) << 16).view(np.float32)
    with pytest.raises(CheckpointError, match=r"mlp\.up"):
        pack_rows16(wide, "mlp.up")
    with pytest.raises(CheckpointError, match=r"mlp\.up"):
        check_finite(w, "mlp.up")


def test_memory_beyond_the_result_is_small():
    w = np.zeros((4096, 2048), np.uint16)
    tracemalloc.start()
    packed = pack_rows16(w)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < packed.nbytes + (2 << 20)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [16, 37])
def test_quantised_rows_interleave_and_come_back(name, rows):
    form = QuantFormat.parse(name)
    made = quantized.pack_fields(form, random_fields(form, rows, 512)).numpy()
    packed = pack_quant16(made, form)
    assert packed.shape == (-(-rows // 16), made.shape[1] * 16) and packed.flags.c_contiguous
    assert np.array_equal(unpack_quant16(packed, form, rows), made)
    first = next(f for f in form.fields() if f.dtype == "codes").begin
    for row in (0, rows - 1):  # a lane of the first dot product: four bytes of codes
        at = first * 16 + row % 16 * 4
        assert np.array_equal(packed[row // 16, at : at + 4], made[row, first : first + 4])


def test_blocks_of_halves_lie_by_turns():
    """Every layout of a gate's matrix, and where its first bad value is."""
    w = np.random.default_rng(0).integers(0, 30000, (96, 33)).astype(np.uint16)
    fields = random_fields(FORM, 96, 64)
    rows = quantized.pack_fields(FORM, fields).numpy()
    for array, layout in ((w, "rows16"), (w, "pairs16"), (rows, f"quant16.{FORM.name}")):
        plain, turned = pack(array, layout), pack(array, with_halves(layout))
        assert has_halves(with_halves(layout)) and not has_halves(layout)
        assert kind_of(with_halves(layout)) == kind_of(layout) == layout.partition(".")[0]
        assert np.array_equal(turned, plain[[0, 3, 1, 4, 2, 5]])
        assert np.array_equal(in_order(turned), plain) and turned.flags.c_contiguous
    w[50, 3] = 0x7F80
    fields.scales[50, 0] = float("inf")
    rows = quantized.pack_fields(FORM, fields).numpy()
    for array, layout, place in ((w, "pairs16", 3), (rows, f"quant16.{FORM.name}", 0)):
        with pytest.raises(CheckpointError, match=rf"gate.*first at \[50, {place}\]"):
            pack(array, with_halves(layout), "gate")


@pytest.mark.parametrize("name", FORMATS)
def test_bad_scales_are_named(name):
    form = QuantFormat.parse(name)
    fields = random_fields(form, 40, 512)
    scales = fields.scales if fields.super_scales is None else fields.super_scales
    scales[35, -1] = float("inf")
    with pytest.raises(CheckpointError, match=r"scales of q_proj.*first at \[35, "):
        pack_quant16(quantized.pack_fields(form, fields).numpy(), form, "q_proj")
    if form.minimums in quantized.SCALE_DTYPES:
        fields = random_fields(form, 3, 512)
        assert fields.minimums is not None
        fields.minimums[1, 0] = torch.nan
        with pytest.raises(CheckpointError, match="scales of q_proj"):
            pack_quant16(quantized.pack_fields(form, fields).numpy(), form, "q_proj")
