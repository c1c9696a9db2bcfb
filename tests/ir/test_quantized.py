"""Quantised rows: every format round trips, the values are what the names say, searches pay."""

from __future__ import annotations

import pytest
import torch

from aios_compile.ir import ops, quantized
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantize_rows import quantize_rows
from aios_compile.ir.quantized import SCALE_DTYPES, QuantFields, dequantize

assert ops.TABLE
torch.set_num_threads(1)
aios = torch.ops.aios
QUANTIZERS = ("int8_g32_f16", "int4_g32_f16", "int4_g128_bf16", "uint4_g64_f16_min_f16")
FORMATS = (
    *QUANTIZERS,
    "int8_g64_f32",
    "uint8_g32_f16_min_zero",
    "int6_g16_k",
    "uint5_g32_k_min_k",
    "uint4_g32_k_min_k",
    "uint4_g128_f16_min_zero",
    "uint5_g32_f16_min_f32",
)


def random_fields(form: QuantFormat, rows: int, depth: int) -> QuantFields:
    def scales(kind: str, whole: torch.dtype, count: int) -> torch.Tensor:
        if kind in SCALE_DTYPES:
            return torch.randn(rows, count).to(SCALE_DTYPES[kind])
        return torch.randint(0, 127, (rows, count)).to(whole)

    groups = depth // form.group
    codes = torch.randint(0, 1 << form.bits, (rows, depth), dtype=torch.uint8)
    supers = [torch.rand(rows, depth // 256).half() if k == "k" else None
              for k in (form.scales, form.minimums)]  # fmt: skip
    minimums = scales(form.minimums, torch.uint8, groups) if form.minimums else None
    return QuantFields(codes, scales(form.scales, torch.int8, groups), minimums, *supers)


@pytest.mark.parametrize("name", FORMATS)
def test_fields_and_values_of_a_format(name: str) -> None:
    form = QuantFormat.parse(name)
    assert form.name == name
    fields = random_fields(form, 5, 512)
    rows = quantized.pack_fields(form, fields)
    assert rows.shape == (5, form.row_bytes(512)) and form.depth(rows.shape[1]) == 512
    assert sum(f.end - f.begin for f in form.fields()) == form.span_bytes
    found = quantized.unpack_fields(form, rows)
    for key, value in vars(fields).items():
        got = getattr(found, key)
        assert (value is None and got is None) or torch.equal(value, got), key
    values = dequantize(rows, form)
    for row, k in ((0, 0), (4, 511), (2, 257), (3, 100)):  # by hand, element by element
        group, block = k // form.group, k // 256
        scale = fields.scales[row, group].float()
        if fields.super_scales is not None:
            scale = scale * fields.super_scales[row, block].float()
        minimum = torch.tensor(0.0)
        if fields.minimums is not None:
            minimum = fields.minimums[row, group].float()
            minimum = minimum * scale if form.minimums == "zero" else minimum
            if fields.super_minimums is not None:
                minimum = minimum * fields.super_minimums[row, block].float()
        assert values[row, k] == (float(fields.codes[row, k]) + form.low) * scale - minimum


@pytest.mark.parametrize("name", [*FORMATS, "uint4_g64_f32_min_f16"])
def test_one_row_alone_means_what_it_means_among_others(name: str) -> None:
    """Rows of a group: their bytes need be no multiple of a scale's (a lookup of one token)."""
    form = QuantFormat.parse(name)
    rows = quantized.pack_fields(form, random_fields(form, 5, form.span))
    whole = dequantize(rows, form)
    for i in range(5):
        assert torch.equal(dequantize(rows[i : i + 1], form), whole[i : i + 1])
        assert torch.equal(aios.quantized_embedding(rows, torch.tensor([i]), name), whole[[i]])


@pytest.mark.parametrize("name", ["int3_g32_f16", "int5_g16_f16", "int4_g32", "int4_g32_k_min"])
def test_names_that_are_no_format(name: str) -> None:
    with pytest.raises(ValueError, match="no quantised format"):
        QuantFormat.parse(name)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_linear_is_the_product_of_what_was_rounded(name: str) -> None:
    form = QuantFormat.parse(name)
    rows = quantized.pack_fields(form, random_fields(form, 7, 256))
    x, bias = torch.randn(3, 256), torch.randn(7)
    codes, scales = quantized.quantize_activations(x)
    seen = codes.double() * scales.double().repeat_interleave(32, -1)
    assert (seen - x).abs().max() <= scales.max() / 2 * (1 + 1e-5)
    want = seen @ dequantize(rows, form).double().T + bias
    got = aios.quantized_linear(x, rows, name, bias)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5 * float(want.abs().max()))
    exact = aios.quantized_linear(x.double(), rows, name, bias.double())
    exact_want = x.double() @ dequantize(rows, form).double().T + bias
    torch.testing.assert_close(exact, exact_want)


def test_zeros_and_bad_values_in_activations() -> None:
    x = torch.zeros(1, 64)
    x[0, 40], x[0, 3] = float("nan"), 1e-38
    codes, scales = quantized.quantize_activations(x)
    assert scales[0, 0] == 0 and scales[0, 1].isnan() and not codes.any()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_search_beats_rounding_to_the_largest_value(name: str) -> None:
    form = QuantFormat.parse(name)
    torch.manual_seed(0)
    w = torch.randn(64, 256) * 0.02
    w[3, 64:192] = 0
    got = dequantize(quantize_rows(w, name), form)
    assert not got[3, 64:192].any()
    groups = w.reshape(-1, form.group)
    if form.minimums:
        low, high = groups.amin(-1, True), groups.amax(-1, True)
        step = (high - low).clamp_min(1e-9) / 15
        plain = ((groups - low) / step).round() * step + low
    else:  # what llama.cpp's Q4_0 and Q8_0 do
        top = groups.gather(1, groups.abs().argmax(-1, True))
        step = top / (form.low if form.bits == 4 else 127)
        step = torch.where(step == 0, 1.0, step).half().float()
        plain = (groups / step).round().clamp(form.low, -form.low - 1) * step
    error, naive = (got - w).norm(), (plain.reshape(w.shape) - w).norm()
    assert error < (0.96 if form.bits == 4 else 1.001) * naive


def test_nan_weights_give_scales_that_show_it() -> None:
    w = torch.randn(2, 64)
    w[1, 40] = float("inf")
    for name in ("int8_g32_f16", "int4_g32_f16", "uint4_g64_f16_min_f16"):
        form = QuantFormat.parse(name)
        fields = quantized.unpack_fields(form, quantize_rows(w, name))
        assert not fields.scales[1].isfinite().all() and fields.scales[0].isfinite().all()
