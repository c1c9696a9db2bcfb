"""Dequantisers: equal to the gguf package's bit for bit, on random and on extreme blocks."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as reference
from gguf.quants import quantize

from aios_compile.checkpoint.gguf_blocks import BLOCK_TYPES, dequantize


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_random_blocks(name: str) -> None:
    """Every bit is drawn: all codes, 6-bit scales of every value, subnormal and huge halves."""
    kind = GGMLQuantizationType[name]
    block = BLOCK_TYPES[name]
    assert (block.num_weights, block.num_bytes) == GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (257, 4 * block.num_bytes), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        expected = reference(data, kind)
    got = dequantize(name, data)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.8 and np.array_equal(np.isfinite(got), finite)
    assert np.array_equal(got[finite].view(np.uint32), expected[finite].view(np.uint32))


@pytest.mark.parametrize("name", [n for n in BLOCK_TYPES if not n.endswith("_K")])
def test_what_the_package_quantises(name: str) -> None:
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(1).normal(0, 1, (33, 96)).astype(np.float32)
    values[0], values[1, :32] = 0, 1e-7
    data = quantize(values, kind)
    got = dequantize(name, data)
    assert np.array_equal(got, reference(data, kind))
    assert np.abs(got - values).max() < (0.03 if name == "Q8_0" else 0.4)


def test_groups_say_the_same_as_the_values() -> None:
    """Codes, scales and minimums are what the values are made of: nothing else is in them."""
    for name, block in BLOCK_TYPES.items():
        data = np.random.default_rng(2).integers(0, 100, (64, block.num_bytes), dtype=np.uint8)
        groups = block.unpack(data)
        assert groups.codes.dtype == np.uint8 and groups.codes.shape[:2] == groups.scales.shape
        assert groups.codes.shape[1] * groups.codes.shape[2] == block.num_weights
        one = np.ones((64, 1), np.float16)
        scales = groups.scales.astype(np.float64) * (one if groups.super_scales is None
                                                     else groups.super_scales)  # fmt: skip
        values = scales[..., None] * (groups.codes.astype(np.float64) + block.low)
        if groups.minimums is not None:
            supers = one if groups.super_minimums is None else groups.super_minimums
            values -= (groups.minimums.astype(np.float64) * supers)[..., None]
        got = dequantize(name, data).astype(np.float64)
        bound = 2.0**-22 * np.abs(scales).max() * 512
        assert np.abs(got - values.reshape(64, -1)).max() <= bound
