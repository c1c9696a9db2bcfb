"""KV writes alone and fused with the q and k norms and rotation, against the eager bodies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aios_compile.codegen.cpp import build, kv_write, qk_norm_rope_kv_write
from aios_compile.ir import ops  # noqa: F401  (registers the ops)
from tests.codegen.harness import Kernel, make_body, sparse

aios = torch.ops.aios
PAGES = 5


def caches(kv_heads, width, v_width, dtype, page):
    k = torch.randn(PAGES, kv_heads, width, page).to(dtype)
    v = torch.randn(PAGES, kv_heads, page, v_width).to(dtype)
    return k, v


def written_body(shape, dtype):
    """Return the body of a KV write and its operands; shape: heads, widths of k and v, page."""
    kv_heads, width, v_width, page = shape
    inputs = {
        "k": (("T", kv_heads, width), torch.float32),
        "v": (("T", kv_heads, v_width), torch.float32),
        "k_cache": ((PAGES, kv_heads, width, page), dtype),
        "v_cache": ((PAGES, kv_heads, page, v_width), dtype),
        "slots": (("T",), torch.int64),
    }

    def function(k, v, k_cache, v_cache, slots):
        written = aios.kv_write.default(k, v, k_cache, v_cache, slots)
        return written[0], written[1]

    return make_body(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 32, 32, 16), (1, 7, 19, 32)])
def test_kv_write(shape, dtype):
    kv_heads, width, v_width, page = shape
    body, operands = written_body(shape, dtype)
    spec = kv_write.spec_of(body, operands)
    assert spec is not None
    source = kv_write.emit(spec)
    assert source.inplace == ((0, 2), (1, 3))
    built = Kernel(source)
    for tokens in (1, 4, 33):
        k, v = torch.randn(tokens, kv_heads, width), torch.randn(tokens, kv_heads, v_width)
        k_cache, v_cache = caches(kv_heads, width, v_width, dtype, page)
        slots = torch.randperm(PAGES * page)[:tokens]
        expected = kv_write.reference(spec, k, v, k_cache, v_cache, slots)
        built({"T": tokens}, k, v, k_cache, v_cache, slots, k_cache, v_cache, splits=2)
        assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


def write_codes(k, v, k_cache, v_cache, k_scales, v_scales, slots):
    op = aios.quantized_kv_write.default
    written = op(k, v, k_cache, v_cache, k_scales, v_scales, slots)
    return written[0], written[1], written[2], written[3]


@pytest.mark.parametrize("target", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(2, 64, 64, 16), (1, 7, 19, 32)])
def test_codes_are_those_of_the_definition(shape, codes, target):
    """Heads of zeros, tiny, huge, infinite and NaN values among them."""
    if build.Target.named(target).vector_bytes > build.Target.host().vector_bytes:
        pytest.skip("the processor lacks the instructions")
    kv_heads, width, v_width, page = shape
    scales = ((PAGES, kv_heads, page), torch.float32)
    inputs = {
        "k": (("T", kv_heads, width), torch.float32),
        "v": (("T", kv_heads, v_width), torch.float32),
        "k_cache": ((PAGES, kv_heads, width, page), codes),
        "v_cache": ((PAGES, kv_heads, page, v_width), codes),
        "k_scales": scales,
        "v_scales": scales,
        "slots": (("T",), torch.int64),
    }

    body, operands = make_body(write_codes, inputs)
    spec = kv_write.spec_of(body, operands)
    assert spec is not None
    source = kv_write.emit(spec)
    assert source.inplace == ((0, 2), (1, 3), (2, 4), (3, 5))
    built = Kernel(source, build.Target.named(target))
    for tokens in (1, 33):
        k, v = torch.randn(tokens, kv_heads, width), torch.randn(tokens, kv_heads, v_width)
        if tokens > 1:
            k[1], k[2], k[3], v[4] = 0.0, k[2] * 1e-32, k[3] * 1e30, v[4] * 1e-20
            k[5, 0, 0], v[6, 0, 1] = float("nan"), float("inf")
        states = [torch.randint(-127, 128, inputs[n][0]).to(codes) for n in list(inputs)[2:4]]
        states += [torch.rand(scales[0]), torch.rand(scales[0])]
        slots = torch.randperm(PAGES * page)[:tokens]
        expected = kv_write.reference(spec, k, v, *states, slots)
        built({"T": tokens}, k, v, *states, slots, *states, splits=2)
        for found, wanted in zip(states[:2], expected[:2]):
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
        for found, wanted in zip(states[2:], expected[2:]):
            assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


def fused_body(norms, rotated, views):
    def prepare(x, weight, cos, sin):
        if norms:
            x = aios.rms_norm.default(x, weight, 1e-6, False)
        return aios.rope.default(x, cos, sin, False) if rotated else x

    def strided(q, k, v, qw, kw, cos, sin, k_cache, v_cache, slots):
        q, k = prepare(q, qw, cos, sin), prepare(k, kw, cos, sin)
        written = aios.kv_write.default(k, v, k_cache, v_cache, slots)
        return q, written[0], written[1]

    def merged(qkv, qw, kw, cos, sin, k_cache, v_cache, slots):
        parts = torch.ops.aten.split_with_sizes.default(qkv, [4 * 24, 2 * 24, 2 * 24], 1)
        view = torch.ops.aten.view.default
        q = view(parts[0], [qkv.shape[0], 4, 24])
        k = view(parts[1], [qkv.shape[0], 2, 24])
        v = view(torch.ops.aten.slice.Tensor(qkv, 1, 6 * 24, 8 * 24), [qkv.shape[0], 2, 24])
        return strided(q, k, v, qw, kw, cos, sin, k_cache, v_cache, slots)

    return merged if views else strided


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize(("norms", "rotated"), [(True, True), (True, False), (False, True)])
def test_fused_kernel_on_slices_of_the_merged_projection(norms, rotated, views):
    heads, kv_heads, width, page, dtype = 4, 2, 24, 16, torch.bfloat16
    row = (heads + 2 * kv_heads) * width
    shapes = {
        "q": (("T", heads, width), torch.float32),
        "k": (("T", kv_heads, width), torch.float32),
        "v": (("T", kv_heads, width), torch.float32),
    }
    strides = dict.fromkeys(shapes, (row, width, 1))
    if views:
        shapes, strides = {"qkv": (("T", row), torch.float32)}, {}
    inputs = {
        **shapes,
        "qw": ((width,), torch.bfloat16),
        "kw": ((width,), torch.float32),
        "cos": (("T", 16), torch.float32),
        "sin": (("T", 16), torch.float32),
        "k_cache": ((PAGES, kv_heads, width, page), dtype),
        "v_cache": ((PAGES, kv_heads, page, width), dtype),
        "slots": (("T",), torch.int64),
    }
    body, operands = make_body(fused_body(norms, rotated, views), inputs, strides)
    spec = qk_norm_rope_kv_write.spec_of(body, operands)
    assert spec is not None and kv_write.spec_of(body, operands) is None
    built = Kernel(qk_norm_rope_kv_write.emit(spec))
    for tokens in (1, 3, 18):
        qkv = torch.randn(tokens, row)
        parts = [p.view(tokens, -1, width) for p in qkv.split([96, 48, 48], 1)]
        weights = [torch.randn(width).bfloat16(), torch.randn(width)]
        tables = [torch.randn(tokens, 16), torch.randn(tokens, 16)]
        k_cache, v_cache = caches(kv_heads, width, width, dtype, page)
        slots = torch.randperm(PAGES * page)[:tokens]
        sources = [qkv] if views else parts
        arguments = [*sources, *weights, *tables, k_cache, v_cache, slots]
        expected = qk_norm_rope_kv_write.reference(spec, body, *arguments)
        results = []
        for splits in (1, 5):
            out, k_now, v_now = torch.empty(tokens, heads, width), k_cache.clone(), v_cache.clone()
            now = [*sources, *weights, *tables, k_now, v_now, slots]
            built({"T": tokens}, *now, out, k_now, v_now, splits=splits)
            torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(k_now, expected[1], atol=1e-5, rtol=1e-2)
            assert torch.equal(v_now, expected[2])
            results.append((out, k_now))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_slots_beyond_two_to_the_31_elements():
    inputs = {
        "k": (("T", 2, 24), torch.float32),
        "v": (("T", 2, 24), torch.float32),
        "k_cache": ((PAGES, 2, 24, 16), torch.bfloat16),
        "v_cache": ((PAGES, 2, 16, 24), torch.bfloat16),
        "slots": (("T",), torch.int64),
    }

    def function(k, v, k_cache, v_cache, slots):
        written = aios.kv_write.default(k, v, k_cache, v_cache, slots)
        return written[0], written[1]

    body, operands = make_body(function, inputs)
    built = Kernel(kv_write.emit(kv_write.spec_of(body, operands)))
    pages = 2**31 // (2 * 24 * 16) + 3
    k_cache, v_cache = sparse((pages, 2, 24, 16), np.uint16), sparse((pages, 2, 16, 24), np.uint16)
    k, v = torch.randn(1, 2, 24), torch.randn(1, 2, 24)
    slots = torch.tensor([pages * 16 - 5])
    built({"T": 1}, k, v, k_cache, v_cache, slots, k_cache, v_cache)
    for now, cache in ((k, k_cache[-1, :, :, 11]), (v, v_cache[-1, :, 11])):
        assert np.array_equal(cache, now[0].bfloat16().view(torch.uint16).numpy())
