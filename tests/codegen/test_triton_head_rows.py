"""Triton rope, KV writes and their fusion with the norms, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from aios_compile.ir import ops  # noqa: F401  (registers the ops)
from tests.codegen.harness import make_body
from tests.codegen.test_kv_write import PAGES, caches, fused_body, written_body

pytest.importorskip("triton")

from aios_compile.codegen.triton import kv_write, qk_norm_rope_kv_write, rope
from tests.codegen.triton_kernels import Kernel

aios = torch.ops.aios
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(64, 64), (20, 12), (6, 2)])
def test_rope_is_the_reference(width: int, rotated: int, interleaved: bool) -> None:
    heads, row = 3, 3 * width + 7

    def function(x, cos, sin):
        return aios.rope.default(x, cos, sin, interleaved)

    inputs = {
        "x": (("T", heads, width), f32),
        "cos": (("T", rotated), f32),
        "sin": (("T", rotated), f32),
    }
    body, operands = make_body(function, inputs, {"x": (row, width, 1)})
    spec = rope.spec_of(body, operands)
    assert spec is not None
    built = Kernel(rope.emit(spec))
    for tokens in (1, 5, 35):  # one token a program, then blocks of eight
        merged = torch.randn(tokens, row)
        x = merged.as_strided((tokens, heads, width), (row, width, 1))
        angles = torch.randn(tokens, rotated)
        out = torch.full((tokens, heads, width), float("nan"))
        built({"T": tokens}, x, angles.cos(), angles.sin(), out)
        expected = rope.reference(spec, x, angles.cos(), angles.sin())
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("shape", [(2, 32, 32, 16), (1, 7, 19, 32)])
def test_kv_write_is_the_reference(shape, dtype) -> None:
    kv_heads, width, v_width, page = shape
    body, operands = written_body(shape, dtype)
    spec = kv_write.spec_of(body, operands)
    assert spec is not None
    source = kv_write.emit(spec)
    assert source.inplace == ((0, 2), (1, 3))
    built = Kernel(source)
    for tokens in (1, 4, 35):
        k, v = torch.randn(tokens, kv_heads, width), torch.randn(tokens, kv_heads, v_width)
        k_cache, v_cache = caches(kv_heads, width, v_width, dtype, page)
        slots = torch.randperm(PAGES * page)[:tokens]
        expected = kv_write.reference(spec, k, v, k_cache, v_cache, slots)
        built({"T": tokens}, k, v, k_cache, v_cache, slots, k_cache, v_cache)
        assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


@pytest.mark.parametrize(("norms", "rotated"), [(True, True), (True, False), (False, True)])
def test_fused_kernel_on_slices_of_the_merged_projection(norms: bool, rotated: bool) -> None:
    heads, kv_heads, width, page, dtype = 4, 2, 24, 16, bf16
    row = (heads + 2 * kv_heads) * width
    inputs = {
        "qkv": (("T", row), f32),
        "qw": ((width,), bf16),
        "kw": ((width,), f32),
        "cos": (("T", 16), f32),
        "sin": (("T", 16), f32),
        "k_cache": ((PAGES, kv_heads, width, page), dtype),
        "v_cache": ((PAGES, kv_heads, page, width), dtype),
        "slots": (("T",), torch.int64),
    }
    body, operands = make_body(fused_body(norms, rotated, True), inputs)
    spec = qk_norm_rope_kv_write.spec_of(body, operands)
    assert spec is not None and kv_write.spec_of(body, operands) is None
    built = Kernel(qk_norm_rope_kv_write.emit(spec))
    for tokens in (1, 3, 34):
        qkv = torch.randn(tokens, row)
        weights = [torch.randn(width).bfloat16(), torch.randn(width)]
        tables = [torch.randn(tokens, 16), torch.randn(tokens, 16)]
        k_cache, v_cache = caches(kv_heads, width, width, dtype, page)
        slots = torch.randperm(PAGES * page)[:tokens]
        arguments = [qkv, *weights, *tables, k_cache, v_cache, slots]
        expected = qk_norm_rope_kv_write.reference(spec, body, *arguments)
        out = torch.full((tokens, heads, width), float("nan"))
        built({"T": tokens}, *arguments, out, k_cache, v_cache)
        torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(k_cache, expected[1], atol=1e-5, rtol=1e-2)
        assert torch.equal(v_cache, expected[2])
