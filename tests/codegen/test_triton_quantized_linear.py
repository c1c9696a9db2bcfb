"""Weight-only quantised linears of the Triton target in the interpreter, against float64."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from aios_compile.codegen.operand import Operand
from aios_compile.codegen.planar import pack_planar
from aios_compile.codegen.plane import PREFIX, plane_of
from aios_compile.compile_settings import pass_options
from aios_compile.config import CompileOptions
from aios_compile.errors import CodegenError, ConfigError
from aios_compile.ir import ops  # noqa: F401  (registers the ops)
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantize_rows import quantize_rows
from aios_compile.ir.quantized import QuantFields, dequantize, pack_fields
from tests.codegen.harness import make_body
from tests.codegen.triton_modules import load, poisoned, run

pytest.importorskip("triton")

from aios_compile.codegen.triton import fp8_linear, quantized_embedding, quantized_linear
from aios_compile.codegen.triton.cards import card_of
from tests.variants import nightly

aios, aten = torch.ops.aios, torch.ops.aten
FORMS = ("int8_g32_f16", "int4_g32_f16", "uint4_g128_f16_min_zero", "int4_g32_bf16")
LONGER = ("uint4_g128_f16_min_zero", "e4m3_g32_f32")
OTHERS = ("uint4_g32_k_min_k", "uint5_g32_k_min_k", "int6_g16_k", "uint4_g64_f32_min_bf16")


def random_rows(form: QuantFormat, rows: int, depth: int) -> torch.Tensor:
    """Return quantised rows whose parts are all random."""
    g = torch.Generator().manual_seed(rows + depth)
    groups, spans = depth // form.group, depth // form.span

    def floats(name: str, count: int) -> torch.Tensor:
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[name]
        return (torch.rand(rows, count, generator=g) + 0.5).div(50).to(dtype)

    def part(kind: str, lowest: int, dtype: torch.dtype) -> torch.Tensor:
        if kind in ("f16", "bf16", "f32"):
            return floats(kind, groups)
        high = min(15 if kind == "zero" else 60, 2**form.bits)
        return torch.randint(lowest, high, (rows, groups), generator=g).to(dtype)

    codes = torch.randint(0, 2**form.bits, (rows, depth), generator=g).to(torch.uint8)
    return pack_fields(
        form,
        QuantFields(
            codes,
            part(form.scales, -60, torch.int8),
            part(form.minimums, 0, torch.uint8) if form.minimums else None,
            floats("f16", spans) / 16 if form.scales == "k" else None,
            floats("f16", spans) / 16 if form.minimums == "k" else None,
        ),
    )


def plain(x, w, form):
    return aios.quantized_linear.default(x, w, form)


def gated(x, w, form):
    y = aios.quantized_linear.default(x, w, form)
    gate, up = aten.split.Tensor(y, w.shape[0] // 2, 1)
    return aios.gated_activation.default(gate, up, "silu")


def residual(x, w, r, form):
    return aten.add.Tensor(r, aios.quantized_linear.default(x, w, form))


def quantized_body(function, name, rows, depth, extra=()):
    """Return the body and the operands of a linear on planar rows."""
    form = QuantFormat.parse(name)
    inputs = {"x": (("T", depth), torch.float32), "w": ((rows, form.row_bytes(depth)), torch.uint8)}
    inputs |= {n: (shape, torch.float32) for n, shape in extra}
    if extra:
        body, operands = make_body(lambda x, w, r: function(x, w, r, name), inputs)
    else:
        body, operands = make_body(lambda x, w: function(x, w, name), inputs)
    w = operands[1]
    operands[1] = Operand(w.name, w.dtype, w.shape, w.strides, PREFIX + form.name)
    return body, operands


def quantized_spec(function, name, rows, depth, extra=()):
    """Return the format, the body and the spec of a linear on planar rows."""
    body, operands = quantized_body(function, name, rows, depth, extra)
    spec = quantized_linear.spec_of(body, operands)
    assert spec is not None
    return QuantFormat.parse(name), body, spec


@functools.cache
def made(function, name, rows, depth, extra=()):
    form, body, spec = quantized_spec(function, name, rows, depth, extra)
    source = quantized_linear.emit(spec)
    return form, body, source, load(source)


def close(actual, x, w, tail=lambda y: y):
    exact = tail(x.double() @ w.double().T)
    scale = (x.abs().double() @ w.abs().double().T).max()
    assert (actual - exact).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("name", [*FORMS, *OTHERS])
def test_weights_are_dequantised_exactly_enough(name: str) -> None:
    rows, depth = 37, 256
    form, _, source, module = made(plain, name, rows, depth)
    packed = random_rows(form, rows, depth)
    w, planar = dequantize(packed, form), pack_planar(packed, form)
    assert planar.shape == (rows, plane_of(form, depth).row_bytes)
    for tokens in (1, 3, 17) if name in FORMS else (1, 5):
        x, out = torch.randn(tokens, depth), poisoned((tokens, rows))
        run(source, module, [x, planar, out], T=tokens)
        close(out, x, w)


@pytest.mark.parametrize("normed", [False, True])
def test_columns_in_another_order(normed: bool) -> None:
    """With a norm in front, whose weight is taken in the same order."""
    rows, depth, name = 37, 320, "uint4_g32_f16_min_zero"
    form = QuantFormat.parse(name)

    def f(x, w, order, gain):
        x = aios.rms_norm.default(x, gain, 1e-5, True) if normed else x
        return aios.quantized_linear.default(x, w, name, None, order)

    inputs = {"x": (("T", depth), torch.float32), "w": ((rows, form.row_bytes(depth)), torch.uint8)}
    inputs |= {"order": ((depth,), torch.int32), "gain": ((depth,), torch.float32)}
    body, operands = make_body(f, inputs)
    operands[1] = replace(operands[1], packed=PREFIX + form.name)
    spec = quantized_linear.spec_of(body, operands)
    assert spec is not None and spec.order is not None and bool(spec.linear.norm) == normed
    source = quantized_linear.emit(spec)
    module, packed = load(source), random_rows(form, rows, depth)
    order, gain = torch.randperm(depth).to(torch.int32), torch.rand(depth)
    for tokens in (1, 3, 17):
        x, out = torch.randn(tokens, depth), poisoned((tokens, rows))
        run(source, module, [x, pack_planar(packed, form), order, gain, out], T=tokens)
        norm = x.double().pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
        given = (x.double() * norm * gain).float() if normed else x
        close(out, given[:, order], dequantize(packed, form))


@pytest.mark.parametrize("name", FORMS[:2])
def test_tails_and_a_depth_that_fills_no_step(name: str) -> None:
    rows, depth = 42, 96
    form, _, source, module = made(gated, name, rows, depth)
    packed, x = random_rows(form, rows, depth), torch.randn(70, depth)
    w, planar = dequantize(packed, form), pack_planar(packed, form)
    for tokens in (1, 70):
        out = poisoned((tokens, 21))
        run(source, module, [x[:tokens], planar, out], T=tokens)
        silu = torch.nn.functional.silu
        exact = x[:tokens].double() @ w.double().T
        want = silu(exact[:, :21]) * exact[:, 21:]
        assert (out - want).abs().max() < 2e-4 * want.abs().max()
    form, _, source, module = made(residual, name, rows, depth, (("r", ("T", rows)),))
    assert source.inplace == ((0, 2),)
    kept = torch.randn(2, rows)
    into = kept.clone()
    run(source, module, [x[:2], planar, into, into], T=2)
    close(into, x[:2], w, lambda y: y + kept)


def normed(x, w, g, form):
    return aios.quantized_linear.default(aios.rms_norm.default(x, g, 1e-3, True), w, form)


@pytest.mark.parametrize("name", FORMS[:2])
def test_a_norm_of_x_is_part_of_the_kernel(name: str) -> None:
    rows, depth = 37, 160
    form, _, source, module = made(normed, name, rows, depth, (("g", (depth,)),))
    packed, g = random_rows(form, rows, depth), torch.randn(depth)
    w, planar = dequantize(packed, form), pack_planar(packed, form)
    assert all(len(v["launches"]) == 1 for v in module.VARIANTS)
    for tokens in (1, 3):
        x, out = torch.randn(tokens, depth) * 10, poisoned((tokens, rows))
        run(source, module, [x, planar, g, out], T=tokens)
        close(out, aios.rms_norm.default(x, g, 1e-3, True), w)


def in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run the programs of a launch from the last to the first."""
    from triton.runtime.interpreter import InterpreterBuilder

    ascending = InterpreterBuilder.set_grid_idx

    def descending(self, x, y, z):
        ascending(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", descending)


@pytest.mark.parametrize(
    "name",
    ["int8_g32_f16", *nightly(*LONGER)],
)
def test_parts_of_the_depth_are_added_in_their_order(name: str, monkeypatch: Any) -> None:
    """The same bits for 2 to 32 tokens, and whoever of a tile's programs comes last."""
    rows, form = 37, QuantFormat.parse(name)
    depth = 1024 if form.bits == 4 else 512
    body, operands = quantized_body(normed, name, rows, depth, (("g", (depth,)),))
    emitter = fp8_linear if form.is_float else quantized_linear
    spec = emitter.spec_of(body, operands)
    assert spec is not None
    made = [(c.most, c.config) for c in emitter.choices(spec)]
    assert made[1][1].order == made[2][1].order, "2 to 32 tokens"
    shared = [(most, replace(c, split=2 if most else 1)) for most, c in made]
    source = emitter.emit(spec, chosen=shared)
    module = load(source)
    splits = [v["launches"][0]["constexprs"]["SPLIT"] for v in module.VARIANTS]
    assert splits[1] == splits[2] > 1 == splits[3] and source.counters > 0
    floats = form.is_float
    random = quantize_rows(torch.randn(rows, depth), name) if floats else None
    packed = random_rows(form, rows, depth) if random is None else random
    planar, x, g = pack_planar(packed, form), torch.randn(17, depth), torch.randn(depth)
    x_normed = aios.rms_norm.default(x, g, 1e-3, True)
    expected = body(x, packed, g) if floats else x_normed @ dequantize(packed, form).T

    def computed(tokens: int) -> torch.Tensor:
        out = poisoned((tokens, rows))
        run(source, module, [x[:tokens], planar, g, out], T=tokens)
        return out

    few, many = computed(2), computed(17)
    torch.testing.assert_close(many, expected, atol=2e-3 * float(expected.abs().max()), rtol=0)
    one = computed(1)
    in_reverse(monkeypatch)
    assert torch.equal(few, many[:2]) and torch.equal(computed(17), many)
    assert torch.equal(computed(1), one)
    torch.testing.assert_close(one, many[:1], atol=1e-3 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(("name", "depth"), [("e4m3_g32_f32", 96), ("e4m3_g128_f32", 256)])
def test_8_bit_floats_are_the_definition(name: str, depth: int) -> None:
    """Both factors are rounded to e4m3 as the op's reference has them; the products are exact."""
    rows, form = 37, QuantFormat.parse(name)
    packed = quantize_rows(torch.randn(rows, depth), name)
    w, planar, g = dequantize(packed, form), pack_planar(packed, form), torch.randn(depth)
    x = torch.randn(19, depth) * 10.0 ** torch.randint(-3, 4, (19, 1))
    x[3] = 0.0
    for function, extra in ((plain, ()), (normed, (("g", (depth,)),))):
        body, operands = quantized_body(function, name, rows, depth, extra)
        spec = fp8_linear.spec_of(body, operands)
        assert spec is not None and quantized_linear.spec_of(body, operands) is None
        source = fp8_linear.emit(spec)
        module = load(source)
        for tokens in (1, 3, 19):
            arguments, out = [x[:tokens], planar, *([g] if extra else [])], poisoned((tokens, rows))
            run(source, module, [*arguments, out], T=tokens)
            expected = body(x[:tokens], packed, *arguments[2:])
            scale = expected.abs().amax(1, keepdim=True)
            assert ((out - expected).abs() <= 4e-6 * scale + 1e-12).float().mean() > 0.97
            assert ((out - expected).abs() <= 5e-3 * scale + 1e-12).all()  # a tie rounds otherwise
            exact = arguments[0] if not extra else aios.rms_norm.default(x[:tokens], g, 1e-3, True)
            lost = (out - exact @ w.T).norm() / (exact @ w.T).norm()
            assert lost < 0.05


def test_8_bit_floats_are_refused_where_nothing_multiplies_them() -> None:
    body, operands = quantized_body(plain, "e4m3_g32_f32", 64, 64, ())
    spec = fp8_linear.spec_of(body, operands)
    assert spec is not None
    for target in ("cuda:80", "hip:gfx942"):
        with pytest.raises(CodegenError, match=f"{target} .* does not multiply e4m3"):
            fp8_linear.emit(spec, card_of(target))


def test_the_same_bits_again_and_other_layouts_are_refused() -> None:
    form, body, source, module = made(plain, "int4_g32_f16", 37, 256)
    planar, x = pack_planar(random_rows(form, 37, 256), form), torch.randn(3, 256)
    outs = [poisoned((3, 37)) for _ in range(2)]
    for out in outs:
        run(source, module, [x, planar, out], T=3)
    assert torch.equal(*outs)
    inputs = {"x": (("T", 256), torch.float32), "w": ((37, form.row_bytes(256)), torch.uint8)}
    _, operands = make_body(lambda x, w: plain(x, w, form.name), inputs)
    assert quantized_linear.spec_of(body, operands) is None


@pytest.mark.parametrize("name", [*FORMS, *OTHERS])
def test_rows_of_a_quantised_table_are_the_formats_own_bits(name: str) -> None:
    form, rows, depth = QuantFormat.parse(name), 37, 1280
    inputs = {"w": ((rows, form.row_bytes(depth)), torch.uint8), "ids": (("T",), torch.int64)}
    body, operands = make_body(
        lambda w, ids: aios.quantized_embedding.default(w, ids, form.name), inputs
    )
    assert quantized_embedding.spec_of(body, operands) is None  # packed as the CPU has it, or not
    w = operands[0]
    operands[0] = Operand(w.name, w.dtype, w.shape, w.strides, PREFIX + form.name)
    spec = quantized_embedding.spec_of(body, operands)
    assert spec is not None
    source, packed = quantized_embedding.emit(spec), random_rows(form, rows, depth)
    ids, out = torch.tensor([0, 36, 5, -3, 2**40]), poisoned((5, depth))
    run(source, load(source), [pack_planar(packed, form), ids, out], T=5)
    want = quantized_embedding.reference(spec, packed, ids.clamp(0, rows - 1))
    assert torch.equal(out, want)


def test_a_cpu_refuses_8_bit_floats() -> None:
    options = CompileOptions.parse({"device": "cpu", "quantization": "fp8"})
    sizes = options.resolve_sizes(64)
    with pytest.raises(ConfigError, match="no CPU multiplies 8-bit floats"):
        pass_options(options, sizes, torch.nn.Linear(2, 2))
