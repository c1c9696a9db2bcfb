"""Vector math of prelude.h against float64: ulp bounds, edges, lanes equal scalars everywhere."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aios_compile.codegen.cpp import build
from tests.codegen.kernels import library

MOST_ULP = {
    "exp": 1.5, "exp2": 1.5, "expm1": 2, "log": 1, "log2": 1, "log1p": 2, "sin": 2, "cos": 2,
    "tanh": 3, "sigmoid": 2.5, "erf": 1.5, "sqrt": 0.5, "rsqrt": 1.5, "floor": 0, "ceil": 0,
    "round": 0, "trunc": 0,
}  # fmt: skip
EXACT = {name: getattr(torch, name) for name in MOST_ULP}
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
SMALLEST_NORMAL = np.finfo(np.float32).tiny
TEMPLATE = """
extern "C" void lanes_{0}(const float* x, float* y, int64_t n) {{
  for_lanes(0, n, [&](int64_t i, auto count) {{ store(y + i, {0}(load(x + i, count)), count); }});
}}
extern "C" void scalar_{0}(const float* x, float* y, int64_t n) {{
  for (int64_t i = 0; i < n; ++i) y[i] = {0}(x[i]);
}}
"""
HALVES = """
extern "C" void narrow_bf16(const float* x, bf16* y, int64_t n) {
  for_lanes(0, n, [&](int64_t i, auto count) { store(y + i, load(x + i, count), count); });
}
extern "C" void exp_of_scores(const float* x, float* y, int64_t n) {
  for_lanes(0, n, [&](int64_t i, auto count) {
    store(y + i, exp_nonpositive(load(x + i, count)), count);
  });
}
extern "C" void narrow_f16(const float* x, f16* y, int64_t n) {
  for_lanes(0, n, [&](int64_t i, auto count) { store(y + i, load(x + i, count), count); });
}
extern "C" void widen_bf16(const bf16* x, float* y, int64_t n) {
  for_lanes(0, n, [&](int64_t i, auto count) { store(y + i, load(x + i, count), count); });
}
extern "C" void widen_f16(const f16* x, float* y, int64_t n) {
  for_lanes(0, n, [&](int64_t i, auto count) { store(y + i, load(x + i, count), count); });
}
"""


@pytest.fixture(scope="module")
def libraries() -> dict[str, ctypes.CDLL]:
    names = [*MOST_ULP, *ACTIVATIONS]
    text = '#include "prelude.h"\n' + "".join(TEMPLATE.format(name) for name in names) + HALVES
    have = [target for target, needs in build.TARGETS if needs <= build.cpu_features()]
    if "NIGHTLY" not in os.environ:  # the header asks for registers only, not for dot products
        have = list({target.vector_bytes: target for target in reversed(have)}.values())[::-1]
    return {target.name: library([("prelude_math", text)], target) for target in have}


def arguments() -> np.ndarray:
    """Return all magnitudes, what activations see, RoPE angles, and the edges."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 40000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    parts = [
        bits,
        rng.standard_normal(40000) * 3,
        rng.uniform(-110, 110, 40000),
        rng.uniform(-131072, 131072, 40000),
        rng.uniform(-1.2, 1.2, 40000),
        [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 88.72, -103.9, 1e-38, 0.5, 3e38],
    ]
    return np.concatenate([np.asarray(p, np.float32) for p in parts])


def apply(lib: ctypes.CDLL, name: str, x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, 7)
    getattr(lib, name)(
        x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(x.size)
    )
    return y


@pytest.mark.parametrize("name", MOST_ULP)
def test_error_in_ulp_and_edges(name: str, libraries: dict[str, ctypes.CDLL]) -> None:
    x = arguments()
    exact = EXACT[name](torch.from_numpy(x).double()).numpy()
    got = apply(next(iter(libraries.values())), f"lanes_{name}", x)
    with np.errstate(all="ignore"):
        want = exact.astype(np.float32)
        normal = np.isfinite(want) & (np.abs(want) >= SMALLEST_NORMAL)
        ulp = np.abs(got[normal].astype(np.float64) - exact[normal]) / np.spacing(
            np.abs(want[normal])
        )
    worst = int(np.argmax(ulp))
    assert ulp[worst] <= MOST_ULP[name], f"{name}({x[normal][worst]!r}): {ulp[worst]:.2f} ulp"
    edges = ~np.isfinite(want)
    np.testing.assert_array_equal(got[edges], want[edges])
    tiny = np.isfinite(want) & ~normal
    assert np.all(np.abs(got[tiny] - want[tiny]) <= SMALLEST_NORMAL)


def test_the_exponential_of_scores(libraries: dict[str, ctypes.CDLL]) -> None:
    """Of nonpositive numbers: 3 ulp, 0 below -87, NaN where there is one, one result everywhere."""
    rng = np.random.default_rng(1)
    parts = [-rng.uniform(0, 100, 40001), -rng.uniform(0, 1, 5000), [0.0, -0.0, -87, -np.inf]]
    x = np.concatenate([*parts, [np.nan]]).astype(np.float32)
    x[7:9] = np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32)  # NaN with low bits
    results = [apply(lib, "exp_of_scores", x) for lib in libraries.values()]
    with np.errstate(invalid="ignore"):
        zero, exact = x < -87, np.exp(x.astype(np.float64))
    nan = np.isnan(x)
    assert np.isnan(results[0][nan]).all() and (results[0][zero] == 0).all()
    rest = ~nan & ~zero
    ulp = np.abs(results[0][rest] - exact[rest]) / np.spacing(exact[rest].astype(np.float32))
    assert ulp.max() <= 3
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("name", [*MOST_ULP, *ACTIVATIONS])
def test_lanes_scalars_and_targets_give_the_same_bits(
    name: str, libraries: dict[str, ctypes.CDLL]
) -> None:
    x = arguments()[::7][:20011]  # odd: the last vector is partial
    results = [apply(lib, f"{kind}_{name}", x) for lib in libraries.values() for kind in
               ("lanes", "scalar")]  # fmt: skip
    for other in results[1:]:
        same = (results[0].view(np.int32) == other.view(np.int32)) | np.isnan(results[0])
        assert same.all() and np.array_equal(np.isnan(results[0]), np.isnan(other))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_torch(name: str, libraries: dict[str, ctypes.CDLL]) -> None:
    x = np.random.default_rng(1).uniform(-12, 12, 5001).astype(np.float32)
    got = apply(next(iter(libraries.values())), f"lanes_{name}", x)
    want = ACTIVATIONS[name](torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_half_precision_rounds_to_nearest_even(
    kind: str, libraries: dict[str, ctypes.CDLL]
) -> None:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    ties = torch.arange(-300, 300).to(dtype).float() * (1 + 2**-9)
    edges = torch.tensor([65519.0, 65520.0, 6e-8, 2.9e-8, 3.4e38, float("inf"), float("nan"), -0.0])
    x = torch.cat((torch.from_numpy(arguments()), ties, edges, ties * 1e-6))
    every = torch.arange(65536).to(torch.int32).to(torch.int16).view(dtype)
    for lib in libraries.values():
        y = torch.zeros(x.shape, dtype=dtype)
        getattr(lib, f"narrow_{kind}")(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(x))
        )
        torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        back = torch.zeros(65536)
        getattr(lib, f"widen_{kind}")(
            ctypes.c_void_p(every.data_ptr()), ctypes.c_void_p(back.data_ptr()),
            ctypes.c_int64(65536),
        )  # fmt: skip
        torch.testing.assert_close(back, every.float(), rtol=0, atol=0, equal_nan=True)


def test_a_small_kernel_compiles_quickly(tmp_path: Path) -> None:
    """The prelude is in every kernel; seconds allow for a busy machine, it takes 0.4 alone."""
    text = '#include "prelude.h"\nextern "C" void f(float* x) { store(x, silu(load(x))); }\n'
    start = time.process_time(), time.monotonic()
    build.build_objects([("small", text)], tmp_path, build.Target.host())
    assert time.monotonic() - start[1] < 5
