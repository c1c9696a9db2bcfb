"""The quantised linear: every format, target and tile gives the same bits; tails, splits, NaN."""

from __future__ import annotations

import functools
import os
import subprocess

import pytest
import torch

from aios_compile.codegen.cpp import build, quantized_linear
from aios_compile.codegen.packing import pack, pack_quant16
from aios_compile.ir import ops, quantized
from aios_compile.ir.quant_format import QuantFormat
from tests.codegen.emulated import emulable, skip_unless_runnable
from tests.codegen.harness import FOLDER, Kernel, make_body
from tests.ir.test_quantized import FORMATS, random_fields
from tests.variants import nightly

assert ops.TABLE
aios, aten = torch.ops.aios, torch.ops.aten
RUNNABLE = [t.name for t, needs in build.TARGETS if needs <= build.cpu_features()]
if "NIGHTLY" in os.environ:
    RUNNABLE += emulable()
elif "avx512bf16" in RUNNABLE:  # for these kernels it is avx512vnni
    RUNNABLE.remove("avx512vnni")
EVERYWHERE = ("int8_g32_f16", "int4_g32_f16", "uint5_g32_k_min_k", "int6_g16_k")
# On every instruction set; `make nightly` takes one format of each width.
WIDTHS = EVERYWHERE if "NIGHTLY" in os.environ else ("int4_g32_f16", "int6_g16_k")
TOKENS = (1, 2, 3, 5, 12, 14, 40)  # tiles of 1, 2, 3, 4, 6 and 8, full and not
ROWS, DEPTH = 37, 512
SHORT = 256  # a whole super-block


def random_rows(name, rows, depth, seed=0):
    torch.manual_seed(seed)
    form = QuantFormat.parse(name)
    return quantized.pack_fields(form, random_fields(form, rows, depth))


def packed(rows, name):
    return pack_quant16(rows.numpy(), QuantFormat.parse(name))


def plain(x, w, form):
    return aios.quantized_linear.default(x, w, form)


def ordered(x, w, form, order):
    return aios.quantized_linear.default(x, w, form, None, order)


def with_bias_and_residual(x, w, form, bias, residual):
    return aten.add.Tensor(residual, aios.quantized_linear.default(x, w, form, bias))


def gated(x, w, form):
    y = aios.quantized_linear.default(x, w, form)
    gate, up = aten.split.Tensor(y, w.shape[0] // 2, 1)
    return aios.gated_activation.default(gate, up, "silu")


@functools.cache
def source_of(function, rows, depth, name, row=None, extra=()):
    inputs = {"x": (("T", depth), torch.float32)}
    inputs["w"] = ((rows, QuantFormat.parse(name).row_bytes(depth)), torch.uint8)
    inputs |= {key: (shape, torch.float32) for key, shape in extra}
    strided = {"x": (row, 1)} if row else None

    def short(x, w):
        return function(x, w, name)

    def long(x, w, bias, residual):
        return function(x, w, name, bias, residual)

    traced = long if extra else short
    layout = f"quant16_halves.{name}" if function is gated else f"quant16.{name}"
    body, operands = make_body(traced, inputs, strided, packed={"w": layout})
    spec = quantized_linear.spec_of(body, operands)
    assert spec is not None
    return spec, body, quantized_linear.emit(spec)


def close(actual, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, atol=2e-6 * scale, rtol=0)


SAME_PATH = [
    name for name in FORMATS if name.startswith(("uint8", "uint4")) or name.endswith("f32")
]


@pytest.mark.parametrize(
    "name", [*(name for name in FORMATS if name not in SAME_PATH), *nightly(*SAME_PATH)]
)
def test_all_formats_targets_and_tiles_give_the_same_bits(name):
    """Every instruction set for some of the formats; the rest, which share it, on the host."""
    rows, depth = ROWS, DEPTH
    weights = random_rows(name, rows, depth)
    spec, body, source = source_of(plain, rows, depth, name, depth + 3)
    merged = torch.randn(max(TOKENS), depth + 3)
    merged[4, 32:64] = 0
    want = quantized_linear.reference(spec, body, merged[:, :depth], weights)
    first = None
    for target in RUNNABLE if name in WIDTHS else RUNNABLE[:1]:
        built = Kernel(source, build.Target.named(target))
        for tokens in TOKENS:
            out = torch.full((tokens, rows), float("nan"))
            for splits in (1, 3):
                built({"T": tokens}, merged[:tokens], packed(weights, name), out, splits=splits)
            first = out if first is None else first
            close(out, want[:tokens])
            assert torch.equal(out[0], first[0]), f"{target}, {tokens} tokens"
            if tokens == max(TOKENS):
                whole = out if target == RUNNABLE[0] else whole  # noqa: F821
                assert torch.equal(out, whole), target


def run_on(target, name, tokens):
    """Return the same linear of `tokens` tokens, computed with a target's instructions."""
    rows, depth = ROWS, SHORT
    torch.manual_seed(7)
    x, out = torch.randn(tokens, depth), torch.full((tokens, rows), float("nan"))
    _, _, source = source_of(plain, rows, depth, name)
    Kernel(source, target)({"T": tokens}, x, packed(random_rows(name, rows, depth), name), out)
    return out


@pytest.mark.parametrize("target", [*RUNNABLE[:1], *nightly(*RUNNABLE[1:])])
def test_columns_in_another_order_are_the_same_as_activations_in_it(target):
    """Bit for bit, also of a depth that fills no whole part of a token."""
    rows, depth, name = ROWS, 1120, "uint4_g32_f16_min_zero"
    weights, order = random_rows(name, rows, depth), torch.randperm(depth).to(torch.int32)
    _, _, direct = source_of(plain, rows, depth, name)
    inputs = {"x": (("T", depth), torch.float32), "w": (tuple(weights.shape), torch.uint8)}
    body, operands = make_body(
        lambda x, w, order: ordered(x, w, name, order),
        inputs | {"order": ((depth,), torch.int32)},
        packed={"w": f"quant16.{name}"},
    )
    spec = quantized_linear.spec_of(body, operands)
    assert spec is not None and spec.order is not None
    source, target = quantized_linear.emit(spec), build.Target.named(target)
    built, straight, x = Kernel(source, target), Kernel(direct, target), torch.randn(13, depth)
    close(ordered(x, weights, name, order), plain(x[:, order], weights, name))
    for tokens in (1, 13):
        out, want = torch.empty(tokens, rows), torch.empty(tokens, rows)
        built({"T": tokens}, x[:tokens], packed(weights, name), order, out, splits=3)
        picked = x[:tokens, order].contiguous()
        straight({"T": tokens}, picked, packed(weights, name), want)
        assert torch.equal(out, want)


def test_neon_gives_the_same_bits():
    """In an emulator; tests/nightly/test_aarch64.py runs every kernel of a model there."""
    skip_unless_runnable("neondot")
    for tokens in (1, 5):
        name, found = "int8_g32_f16", run_on(build.Target.named("neondot"), "int8_g32_f16", tokens)
        assert torch.equal(found, run_on(build.Target.host(), name, tokens))


# AVX-VNNI's instruction has a twin in AVX-512 that differs in its encoding only.
VNNI = build.Target.named("avxvnni")
TWIN = (*build.Target.named("avx2").march_flags, "-mavx512vl", "-mavx512vnni", "-D__AVXVNNI__")
TWIN += ("-D_mm256_dpbusd_avx_epi32=_mm256_dpbusd_epi32",)


def dot_products(source, target):
    """Return the dot product instructions of a kernel, disassembled."""
    (built,) = build.build_objects([source], FOLDER, target, jobs=1)
    command = ["objdump", "-d", "-w", "--no-show-raw-insn", str(built)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split("\t", 1)[1] for line in lines if "vpdpbusd" in line]


@pytest.mark.parametrize("name", EVERYWHERE if "NIGHTLY" in os.environ else ["int8_g32_f16"])
def test_avx_vnni_is_compiled_and_its_twin_gives_the_same_bits(name, monkeypatch):
    """No processor that this was written on has AVX-VNNI itself."""
    monkeypatch.setattr(build, "precompile", lambda *_: [])  # two kernels: reading it takes less
    if build.host_machine() != "x86_64":
        pytest.skip("the processor lacks AVX-512 VNNI")
    _, _, source = source_of(plain, ROWS, SHORT, name)
    twin = build.Target("avxvnni twin", TWIN, 32, "x86_64")
    ours, theirs = dot_products(source, VNNI), dot_products(source, twin)
    assert ours and all(line.startswith("{vex} vpdpbusd") and "ymm" in line for line in ours)
    assert len(theirs) == len(ours) and not any("{vex}" in line for line in theirs)
    if not {"avx512vl", "avx512_vnni"} <= build.cpu_features():
        pytest.skip("the processor lacks AVX-512 VNNI")
    for tokens in (1, 7):
        portable = run_on(build.Target.named("avx2"), name, tokens)
        assert torch.equal(run_on(twin, name, tokens), portable)


def test_a_row_does_not_depend_on_its_batch():
    rows, depth, name = 48, 3072, "int4_g32_f16"
    weights = packed(random_rows(name, rows, depth), name)
    _, _, source = source_of(plain, rows, depth, name)
    built, x = Kernel(source), torch.randn(150, depth)
    whole, one = torch.empty(150, rows), torch.empty(1, rows)
    built({"T": 150}, x, weights, whole, splits=5)
    for t in range(0, 150, 7):
        built({"T": 1}, x[t], weights, one)
        assert torch.equal(one[0], whole[t])


@pytest.mark.parametrize("target", RUNNABLE[:1])
@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_tails(tokens, target):
    rows, depth, name = 50, 96, "int8_g32_f16"
    extra = (("bias", (rows,)), ("residual", ("T", rows)))
    spec, body, source = source_of(with_bias_and_residual, rows, depth, name, extra=extra)
    assert source.inplace == ((0, 3),)
    weights, x = random_rows(name, rows, depth), torch.randn(tokens, depth)
    bias, residual = torch.randn(rows), torch.randn(tokens, rows)
    want = quantized_linear.reference(spec, body, x, weights, bias, residual)
    built = Kernel(source, build.Target.named(target))
    built({"T": tokens}, x, packed(weights, name), bias, residual, residual, splits=2)
    close(residual, want)


@pytest.mark.parametrize("tokens", [1, 4, 29])
def test_gated_halves(tokens):
    rows, depth, name = 2 * 16 * 9, 128, "int4_g64_f16"
    spec, body, source = source_of(gated, rows, depth, name)
    assert spec.linear.streams == 2
    weights, x = random_rows(name, rows, depth), torch.randn(tokens, depth)
    out = torch.full((tokens, rows // 2), float("nan"))
    stored, one = pack(weights.numpy(), f"quant16_halves.{name}"), torch.empty(1, rows // 2)
    built = Kernel(source)
    built({"T": tokens}, x, stored, out, splits=2)
    close(out, quantized_linear.reference(spec, body, x, weights))
    built({"T": 1}, x[-1], stored, one)
    assert torch.equal(one[0], out[-1])


def test_the_largest_codes_do_not_overflow():
    """All codes and activations at their ends, where sums in 16 bits would wrap or saturate."""
    for name in WIDTHS:
        form = QuantFormat.parse(name)
        fields = random_fields(form, ROWS, DEPTH)
        fields.codes.fill_((1 << form.bits) - 1)
        fields.codes[3] = 0
        weights = quantized.pack_fields(form, fields)
        _, _, source = source_of(plain, ROWS, DEPTH, name, DEPTH + 3)
        x = torch.ones(3, DEPTH + 3)
        x[1], x[2, ::2] = -1, -1
        want, out = aios.quantized_linear(x[:, :DEPTH], weights, name), torch.empty(3, ROWS)
        for target in RUNNABLE:
            Kernel(source, build.Target.named(target))({"T": 3}, x, packed(weights, name), out)
            close(out, want)


@pytest.mark.parametrize("name", ["int4_g32_f16", *nightly("int8_g32_f16")])
def test_nan_in_one_token_stays_in_its_row(name):
    weights, x = random_rows(name, ROWS, DEPTH), torch.randn(5, DEPTH + 3)
    x[2, 40] = float("nan")
    _, _, source = source_of(plain, ROWS, DEPTH, name, DEPTH + 3)
    out = torch.zeros(5, ROWS)
    for target in RUNNABLE:
        Kernel(source, build.Target.named(target))({"T": 5}, x, packed(weights, name), out)
        assert out[2].isnan().all() and out[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.nightly  # test_avx_vnni_is_compiled_... has one format
def test_what_this_machine_cannot_run_compiles(tmp_path):
    """The AVX-VNNI path, on any x86: the text is compiled, nothing is run."""
    if not build.cpu_features() & {"sse2"}:
        pytest.skip("no x86 compiler")
    target = build.Target.named("avxvnni")
    for name in WIDTHS:
        _, _, source = source_of(plain, ROWS, DEPTH, name, DEPTH + 3)
        (path,) = build.build_objects([source], tmp_path, target)
        assert path.stat().st_size > 1000
