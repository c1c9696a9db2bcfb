"""rows16 packing: layout, tails, NaN and Inf by name, time and memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from aios_compile.codegen.packing import check_finite, pack_rows16, unpack_rows16
from aios_compile.errors import CheckpointError


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
