"""The linear kernel: every tail, dtype, tile border and target, bitwise invariance, odd sizes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from aios_compile.codegen.cpp import build, linear
from aios_compile.codegen.packing import pack, with_halves
from aios_compile.ir import ops  # noqa: F401  (registers the ops)
from tests.codegen.harness import Kernel, make_body, sparse
from tests.variants import nightly

aios, aten = torch.ops.aios, torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = ("avx512", "avx2", "portable")
SOME = list(dict.fromkeys([build.Target.host().name, "portable"]))
TOKENS = (1, 2, 3, 5, 8, 12, 13, 25, 40)


def skip_unless(target):
    if build.Target.named(target).vector_bytes > build.Target.host().vector_bytes:
        pytest.skip("the processor lacks the instructions")


def packed(w, layout="rows16"):
    bits = w.view(torch.uint16) if w.dtype == torch.bfloat16 else w
    return pack(bits.numpy(), layout)


def layout_of(function):
    """Return the layout of w in the kernel of one of the functions below."""
    layout = "pairs16" if function.__name__.startswith("rounded") else "rows16"
    return with_halves(layout) if "gated" in function.__name__ else layout


def rounded(x, w):
    return aios.bf16_linear.default(x, w)


def rounded_with_bias_and_residual(x, w, bias, residual):
    return aten.add.Tensor(residual, aios.bf16_linear.default(x, w, bias))


def rounded_and_gated(x, w):
    y = aios.bf16_linear.default(x, w)
    gate, up = aten.split.Tensor(y, w.shape[0] // 2, 1)
    return aios.gated_activation.default(gate, up, "silu")


def plain(x, w):
    return aios.linear.default(x, w)


def with_bias_and_residual(x, w, bias, residual):
    return aten.add.Tensor(residual, aios.linear.default(x, w, bias))


def activated_twice(x, w, bias):
    y = aios.linear.default(x, w, bias)
    return aten.silu.default(y), aten.mul.Tensor(y, 0.5)


def gated(x, w):
    y = aios.linear.default(x, w)
    gate, up = aten.split.Tensor(y, w.shape[0] // 2, 1)
    return aios.gated_activation.default(gate, up, "silu")


def gated_by_slices(x, w, scale):
    y = aios.linear.default(x, w)
    half = w.shape[0] // 2
    gate = aten.slice.Tensor(y, 1, 0, half)
    up = aten.slice.Tensor(y, 1, half, 2 * half)
    return aten.mul.Tensor(aten.mul.Tensor(aten.relu.default(gate), up), scale)


@functools.cache
def made(function, rows, depth, dtype, target="avx512", out=None, row=None, extra=()):
    inputs = {"x": (("T", depth), torch.float32), "w": ((rows, depth), dtype)}
    inputs |= {name: (shape, torch.float32) for name, shape in extra}
    strided = {"x": (row, 1)} if row else None
    layout = layout_of(function)
    body, operands = make_body(function, inputs, strided, packed={"w": layout})
    spec = linear.spec_of(body, operands)
    assert spec is not None and spec.pairs == layout.startswith("pairs16")
    source = linear.emit(spec)
    return spec, body, source, Kernel(source, build.Target.named(target))


def close(actual, expected, depth):
    torch.testing.assert_close(actual, expected, atol=2e-6 * depth**0.5 * 8, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "depth", "dtype", "target"),
    [
        *((37, 51, dtype, "avx512") for dtype in DTYPES),
        *((37, 51, torch.bfloat16, target) for target in TARGETS[1:]),
        (37, 51, torch.float32, "avx2"),
        (16, 1, torch.bfloat16, "avx2"),
        *nightly(
            (37, 51, torch.float32, "portable"),
            *((37, 51, torch.float16, target) for target in TARGETS[1:]),
            (80, 64, torch.bfloat16, "avx512"),
        ),
    ],
)
def test_plain_at_all_tile_borders(rows, depth, dtype, target):
    skip_unless(target)
    spec, body, _, built = made(plain, rows, depth, dtype, target, row=depth + 3)
    w = torch.randn(rows, depth).to(dtype)
    merged = torch.randn(max(TOKENS), depth + 3)
    alone = None
    for tokens in TOKENS:
        x = merged[:tokens, :depth]
        for splits in (1, 3):
            out = torch.full((tokens, rows), float("nan"))
            built({"T": tokens}, x, packed(w), out, splits=splits)
            close(out, linear.reference(spec, body, x, w), depth)
            alone = out[0].clone() if alone is None else alone
            assert torch.equal(out[0], alone), "a row depends on its batch or on the split"


@pytest.mark.parametrize(
    ("rows", "depth", "targets"), [(37, 51, SOME), (48, 1030, SOME[:1])], ids=["small", "parts"]
)
def test_rounded_at_all_tile_borders(rows, depth, targets):
    """Every target, tile and split of pairs gives the bits of the chain that is documented."""
    w = torch.randn(rows, depth).bfloat16()
    stored = packed(w, "pairs16")
    merged = torch.randn(max(TOKENS), depth + 3)
    left = merged[:, :depth].bfloat16().double().numpy()
    right, chain = w.double().numpy(), np.zeros((max(TOKENS), rows), np.float32)
    for k in [k + 1 - i for k in range(0, depth, 2) for i in range(2) if k + 1 - i < depth]:
        exact = left[:, k, None] * right[None, :, k]  # of 16 bits: exact in double
        chain = (chain.astype(np.longdouble) + exact).astype(np.float32)
    for target in targets:
        spec, body, _, built = made(rounded, rows, depth, torch.bfloat16, target, row=depth + 3)
        for tokens in TOKENS:
            x = merged[:tokens, :depth]
            for splits in (1, 3):
                out = torch.full((tokens, rows), float("nan"))
                built({"T": tokens}, x, stored, out, splits=splits)
                assert np.array_equal(out.numpy(), chain[:tokens]), (target, tokens, splits)
            close(out, linear.reference(spec, body, x, w), depth)


def test_rounded_extremes():
    """Denormal products vanish or stay, as documented; infinities and NaN stay in their row."""
    rows, depth = 37, 51
    w = torch.full((rows, depth), 2.0**-70).bfloat16()
    x = torch.full((4, depth + 3), 2.0**-70)
    x[1] = 2.0**-20
    x[2, 3], x[3, 4] = float("inf"), float("nan")
    for target in SOME:
        _, _, _, built = made(rounded, rows, depth, torch.bfloat16, target, row=depth + 3)
        out = torch.full((4, rows), 7.0)
        built({"T": 4}, x, packed(w, "pairs16"), out)
        assert (out[0] == (0.0 if build.Target.named(target).bf16_dot else depth * 2.0**-140)).all()
        assert (out[1] == depth * 2.0**-90).all()
        assert (out[2] == float("inf")).all() and out[3].isnan().all()


@pytest.mark.parametrize("function", [plain, rounded], ids=["float32", "rounded"])
def test_row_bits_do_not_depend_on_the_batch(function):
    """Every row of 100 tokens, which take all tile widths and two chunks, equals the row alone."""
    rows, depth = 48, 4000
    _, _, _, built = made(function, rows, depth, torch.bfloat16)
    w, x = torch.randn(rows, depth).bfloat16(), torch.randn(100, depth)
    stored = packed(w, "pairs16" if function is rounded else "rows16")
    whole, one = torch.empty(100, rows), torch.empty(1, rows)
    built({"T": 100}, x, stored, whole, splits=5)
    for t in range(100):
        built({"T": 1}, x[t], stored, one)
        assert torch.equal(one[0], whole[t])
    x = x.bfloat16().float() if function is rounded else x
    chain = np.float32(0)
    for a, b in zip(x[7].tolist(), w[3].tolist()):  # the order that is promised: k ascending, fma
        chain = np.float32(np.float64(a) * np.float64(b) + np.float64(chain))
    assert abs(float(chain) - float(whole[7, 3])) <= 2e-6 * abs(float(chain)) + 1e-6


@pytest.mark.parametrize("target", [*SOME[:1], *nightly(*TARGETS)])
@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_tails(tokens, target):
    skip_unless(target)
    rows, depth = 50, 40
    extra = (("bias", (rows,)), ("residual", ("T", rows)))
    spec, body, source, built = made(
        with_bias_and_residual, rows, depth, torch.bfloat16, target, extra=extra
    )
    assert source.inplace == ((0, 3),)
    x, w = torch.randn(tokens, depth), torch.randn(rows, depth).bfloat16()
    bias, residual = torch.randn(rows), torch.randn(tokens, rows)
    expected = linear.reference(spec, body, x, w, bias, residual)
    built({"T": tokens}, x, packed(w), bias, residual, residual, splits=2)  # in place
    close(residual, expected, depth)
    spec, body, _, built = made(
        rounded_with_bias_and_residual, rows, depth, torch.bfloat16, target, extra=extra
    )
    expected = linear.reference(spec, body, x, w, bias, expected)
    built({"T": tokens}, x, packed(w, "pairs16"), bias, residual, residual, splits=2)
    close(residual, expected, depth)
    spec, body, source, built = made(
        activated_twice, rows, depth, torch.bfloat16, target, extra=extra[:1]
    )
    first, second = torch.empty(tokens, rows), torch.empty(tokens, rows)
    built({"T": tokens}, x, packed(w), bias, first, second)
    for actual, wanted in zip((first, second), linear.reference(spec, body, x, w, bias)):
        close(actual, wanted, depth)


@pytest.mark.parametrize("target", [*SOME[:1], *nightly(*TARGETS)])
@pytest.mark.parametrize("tokens", [1, 4, 29])
def test_gated_halves(tokens, target):
    skip_unless(target)
    rows, depth = 2 * 48, 33
    x, w = torch.randn(tokens, depth), torch.randn(rows, depth).bfloat16()
    by_slices = (gated_by_slices, (("scale", (rows // 2,)),))
    for function, extra in ((gated, ()), by_slices, (rounded_and_gated, ())):
        spec, body, _, built = made(function, rows, depth, torch.bfloat16, target, extra=extra)
        assert spec.streams == 2
        tail = [torch.randn(rows // 2)] if extra else []
        out = torch.full((tokens, rows // 2), float("nan"))
        built({"T": tokens}, x, packed(w, layout_of(function)), *tail, out, splits=2)
        close(out, linear.reference(spec, body, x, w, *tail), depth)
        one = torch.empty(1, rows // 2)
        built({"T": 1}, x[-1], packed(w, layout_of(function)), *tail, one)
        assert torch.equal(one[0], out[-1])


def test_weights_beyond_two_to_the_31_elements():
    rows, depth = (1 << 21) + 16, 1024
    _, _, _, built = made(plain, rows, depth, torch.bfloat16)
    w = sparse((rows // 16, depth, 16), np.uint16)
    assert w.size > 2**31
    last = torch.randn(16, depth).bfloat16()
    w[-1] = packed(last)[0]
    x, out = torch.randn(2, depth), sparse((2, rows), np.float32)
    built({"T": 2}, x, w, out, last_only=True)
    close(torch.from_numpy(out[:, -16:].copy()), x @ last.float().T, depth)


def test_refusals():
    """A gate that is not a multiple of 16 rows, a tail over tokens, a weight packed otherwise."""
    inputs = {"x": (("T", 8), torch.float32), "w": ((24, 8), torch.float32)}
    for function, names in (
        (gated, {"w": "rows16_halves"}),
        (lambda x, w: aten.cumsum.default(aios.linear.default(x, w), 0), ("w",)),
        (plain, ()),
        (plain, {"w": "pairs16"}),
        (rounded, {"w": "rows16"}),
        (plain, {"w": "rows16_halves"}),
        (lambda x, w: aten.neg.default(x), ("w",)),
    ):
        body, operands = make_body(function, inputs, packed=names)
        assert linear.spec_of(body, operands) is None
    inputs["w"] = ((32, 8), torch.float32)
    for layout in ("rows16", "rows16_halves"):
        body, operands = make_body(gated, inputs, packed={"w": layout})
        assert (linear.spec_of(body, operands) is None) == (layout == "rows16")


def test_the_text_names_the_formula_and_is_pure():
    spec, _, source, _ = made(gated, 96, 33, torch.bfloat16)
    assert "silu" in source.text and source == linear.emit(spec)
