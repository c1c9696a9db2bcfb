"""Conversions between float32 and e4m3 bits on every path, against torch.float8_e4m3fn."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from aios_compile.codegen.cpp import build
from tests.codegen.kernels import library

TEXT = """
#include "prelude.h"
#include "e4m3.h"
extern "C" void narrow(const float* x, e4m3* y, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) store(y + i, load(x + i));
}
extern "C" void widen(const e4m3* x, float* y, int64_t n) {
  for_lanes(0, n, [&](int64_t i, auto count) { store(y + i, load(x + i, count), count); });
}
"""


def floats() -> torch.Tensor:
    """Return every tie between two codes and its neighbours, random bits, and the edges."""
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = torch.cat([(codes[1:] + codes[:-1]) / 2, torch.tensor([464.0, 480.0])])
    near = [torch.nextafter(ties, torch.tensor(to)) for to in (-torch.inf, torch.inf)]
    edges = [0.0, 448.0, 449.0, 465.0, 1e9, torch.inf, torch.nan, 2.0**-10, 2.0**-149, 2.0**-126]
    bits = np.random.default_rng(0).integers(0, 2**32, 40000, dtype=np.uint64)
    every = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
    size = torch.cat([codes, ties, *near, torch.tensor(edges), every, torch.randn(40000) * 9])
    both = torch.cat([size, -size])
    return both[: len(both) // 16 * 16].contiguous()


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def to_codes(x: torch.Tensor) -> torch.Tensor:
    """Return the bits that the definition stores: saturated, NaN kept; all NaN are one."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


PATHS = ("avx512", "avx2", "portable")  # as many as there are texts
HERE = [t.name for t, needs in build.TARGETS if t.name in PATHS and needs <= build.cpu_features()]


@pytest.mark.parametrize("target", HERE)
def test_the_cpu_paths(target: str) -> None:
    built = library([("e4m3", TEXT)], build.Target.named(target))
    x = floats()
    found = torch.zeros(len(x), dtype=torch.uint8)
    built.narrow(pointer(x), pointer(found), ctypes.c_int64(len(x)))
    wanted = to_codes(x)
    assert torch.equal(found[~x.isnan()], wanted[~x.isnan()])
    assert (found[x.isnan()] & 127 == 127).all()

    codes = torch.arange(256, dtype=torch.uint8)
    for count in (256, 3):
        numbers = torch.zeros(count)
        built.widen(pointer(codes), pointer(numbers), ctypes.c_int64(count))
        meant = codes[:count].view(torch.float8_e4m3fn).float()
        assert torch.equal(numbers.isnan(), meant.isnan())
        same = numbers.nan_to_num(0.0).view(torch.int32) == meant.nan_to_num(0.0).view(torch.int32)
        assert same.all()


MODULE = """
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(True)
NATIVE_E4M3 = tl.constexpr(False)


{template}


@triton.jit
def narrow(x, y, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(y + i, e4m3_bits(tl.load(x + i)))


@triton.jit
def widen(x, y, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(y + i, e4m3_numbers(tl.load(x + i)).to(tl.float32))
"""


def test_the_triton_path_of_cards_without_e4m3() -> None:
    """The same text runs in the interpreter; its writer never sees a NaN."""
    pytest.importorskip("triton")
    from aios_compile.codegen.source import KernelSource
    from aios_compile.codegen.triton.template import TEMPLATES
    from tests.codegen.triton_kernels import load

    text = MODULE.format(template=(TEMPLATES / "e4m3.py.txt").read_text())
    module = load(KernelSource("e4m3", "e4m3", "triton", text, 2))
    x = floats()
    x = torch.where(x.abs() <= 500, x, 0.0)  # NaN and what no scaled number is
    x = torch.cat([x, torch.zeros(-len(x) % 1024)])
    found = torch.zeros(len(x), dtype=torch.uint8)
    module.narrow[(len(x) // 1024,)](x, found, COUNT=1024)
    assert torch.equal(found, to_codes(x))

    codes, numbers = torch.arange(256, dtype=torch.uint8), torch.zeros(256)
    module.widen[(1,)](codes, numbers, COUNT=256)
    meant = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(numbers.isnan(), meant.isnan())
    assert torch.equal(
        numbers.nan_to_num(0.0).view(torch.int32), meant.nan_to_num(0.0).view(torch.int32)
    )
