"""Triton modules compiled for GPUs that are not there: resources, no spills, 16-byte loads.

The whole matrix of shapes, targets and dtypes is in tests/nightly/test_triton_matrix.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from aios_compile.codegen.triton import fp8_linear, linear, quantized_linear, sample
from aios_compile.codegen.triton.cards import card_of
from aios_compile.codegen.triton.compile_ahead import compile_ahead, parse_target
from aios_compile.codegen.triton.configs import Config
from aios_compile.codegen.triton.dependent_launch import with_dependent_launch
from aios_compile.errors import CodegenError
from tests.codegen.test_sample import body_of
from tests.codegen.test_triton_quantized_linear import plain, quantized_body
from tests.codegen.triton_shapes import linear_spec
from tests.variants import nightly

WEIGHT_LOADS = re.compile(r"ld\.global\S*evict_first\S*")
COPIES = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x\w+)")


@pytest.mark.parametrize(
    ("layer", "target"), [("down", "cuda:90"), *nightly(("gate_up", "cuda:80"))]
)
def test_linear_kernels_use_what_is_pinned(layer: str, target: str, tmp_path: Path) -> None:
    """(most registers, KiB of shared memory) with triton 3.7; others only may not spill."""
    pinned = {
        ("down", "cuda:90"): {"rows": (62, 8), "dot": (109, 128), "tile": (190, 112)},
        ("gate_up", "cuda:80"): {"rows": (64, 2), "dot": (255, 72), "tile": (168, 48)},
    }[layer, target]
    source = linear.emit(linear_spec("Qwen3-0.6B", layer), card_of(target))
    (binaries,) = compile_ahead([source], target, tmp_path)
    kinds = [b.kernel.split("_")[3] for b in binaries if "combine" not in b.kernel]
    assert kinds[0] == "rows" and kinds[-1] == "tile" and "dot" in kinds
    for binary in binaries:
        kind, text = binary.kernel.split("_")[3], binary.assembly()
        assert binary.spill_bytes == 0, binary
        registers, kilobytes = pinned[kind]
        registers = registers if triton.__version__.startswith("3.7.") else 255
        assert 8 < binary.registers <= registers, binary
        assert binary.shared_bytes <= kilobytes << 10, binary
        if kind == "rows":
            loads = WEIGHT_LOADS.findall(text)
            assert loads and all(load.endswith("v4.b32") for load in loads), loads
        elif "combine" not in binary.kernel:
            assert set(COPIES.findall(text)) == {"0x10"}
            assert "wgmma" in text or "mma.sync" in text


@pytest.mark.parametrize(
    "form", ["int4_g32_f16", "bf16", *nightly("int8_g32_f16", "e4m3_g128_f32")]
)
def test_rows_of_weights_stream_and_nothing_is_exchanged_in_the_loop(
    form: str, tmp_path: Path
) -> None:
    """The chosen kernel for one token; every variant of two models: nightly/test_triton_models.

    Codes come 4 bytes a thread, 128 of a row in a warp; bf16 weights 16 bytes a thread. No barrier,
    no shared memory and no slow conversion stands between the loop's label and its branch back.
    """
    card = card_of("cuda:90")
    if form == "bf16":
        emitter, spec, width = linear, linear_spec("Llama-3.1-8B", "down"), "v4.b32"
    else:
        emitter = fp8_linear if form.startswith("e4m3") else quantized_linear
        spec, width = emitter.spec_of(*quantized_body(plain, form, 1024, 4096)), ".b32"
    rows = [(c.most, c.config) for c in emitter.choices(spec, card) if c.most == 1]
    source = emitter.emit(spec, card, rows)
    ((binary,),) = compile_ahead([source], card.target, tmp_path)
    text = binary.assembly()
    loads = WEIGHT_LOADS.findall(text)
    assert binary.spill_bytes == 0 and binary.registers <= 128, binary
    assert loads and all(load.endswith(width) for load in loads), loads
    loop = max(loops(text), key=len)
    assert WEIGHT_LOADS.search(loop) and "fma.rn.f32" in loop
    exchanged = ("bar.sync", "shared", "shfl", "cvt.rn.f32.u8", "cvt.rn.f32.u16")
    assert not [word for word in exchanged if word in loop]


def loops(ptx: str) -> list[str]:
    """Return the texts from a label to a branch back to it."""
    found = []
    for label in re.finditer(r"^(\$L\w+):", ptx, re.M):
        back = re.compile(rf"bra(?:\.uni)?\s+{re.escape(label.group(1))};")
        found += [ptx[label.end() : end.start()] for end in back.finditer(ptx, label.end())]
    return found


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100"])
def test_dependent_launches_prefetch_then_wait_then_read(target: str, tmp_path: Path) -> None:
    """On cards that have them; on others nothing of it is left in the text."""
    card = card_of(target)
    assert card.dependent_launch == (target != "cuda:80")
    spec = linear_spec("Qwen3-0.6B", "down")
    chosen = [(most, c) for most, c in linear.choose(spec, card) if most != 32][::2]
    source = linear.emit(spec, card, chosen)
    if not card.dependent_launch:
        assert not any(word in source.text for word in ("prefetch", "gdc_", "launch_pdl"))
        return
    source = with_dependent_launch(source)
    (binaries,) = compile_ahead([source], target, tmp_path)
    assert len(binaries) >= 2
    for binary in binaries:
        text = binary.assembly()
        first_read = min(x for x in map(text.find, ("ld.global", "cp.async")) if x > 0)
        started, wait = (text.find(f"griddepcontrol.{x}") for x in ("launch_dependents", "wait"))
        assert 0 < started < wait < first_read, "nothing is read before the wait"
        if "_tile_" not in binary.kernel:
            assert 0 < text.find("prefetch.global.L2") < wait and binary.spill_bytes == 0


@pytest.mark.parametrize("target", ["cuda:90", "cuda:100"])
def test_descriptors_become_bulk_copies(target: str, tmp_path: Path) -> None:
    spec = linear_spec("Qwen3-0.6B", "down")
    chosen = ((None, Config("descriptor", 128, 64, 64, 8, 3)),)
    chosen = ((2048, Config("library", 1, 1, 1, 4)), *chosen)
    source = with_dependent_launch(linear.emit(spec, card_of(target), chosen))
    (binaries,) = compile_ahead([source], target, tmp_path)
    assert [b.kernel.rpartition("_")[2] for b in binaries] == ["split", "tail", "any"]
    binary = binaries[-1]
    text = binary.assembly()
    assert "cp.async.bulk.tensor.2d" in text and binary.spill_bytes == 0, binary
    assert ("wgmma.mma_async" if target == "cuda:90" else "tcgen05.mma") in text
    with pytest.raises(CodegenError, match="cuda:80 has no tensor descriptors"):
        linear.emit(spec, card_of("cuda:80"), chosen)


def test_the_sampler_reads_16_bytes_and_fuses_nothing_itself(tmp_path: Path) -> None:
    """Noise is two logarithms an element, each of five fma: a sixth would change tokens."""
    spec = sample.spec_of(*body_of(8192))
    assert spec is not None
    (binaries,) = compile_ahead([sample.emit(spec)], "cuda:90", tmp_path)
    assert all(b.spill_bytes == 0 for b in binaries), binaries
    by_name = {b.kernel.split("_")[-1]: b for b in binaries}
    assert list(by_name) == list(sample.ARGUMENTS)
    assert "ld.global.v4.b32" in by_name["measure"].assembly()
    draw = by_name["draw"]
    elements = sample.CHUNK // (32 * draw.num_warps)
    text = draw.assembly()
    assert text.count("fma.rn.f32") == 10 * elements and ".ftz" not in text
    assert text.count("div.rn.f32") == 4 * elements  # a true quotient where s is made, then 3


def test_a_kernel_that_would_trap_is_an_error(tmp_path: Path) -> None:
    """Triton 3.7 compiles a tile that does not fit tensor memory to `trap;` and says nothing."""
    spec = linear_spec("Qwen3-0.6B", "qkv")
    wide = ((None, Config("tile", 128, 256, 64, 8, 3)),)
    source = linear.emit(spec, card_of("cuda:100"), wide)
    with pytest.raises(CodegenError, match="trap"):
        compile_ahead([source], "cuda:100", tmp_path)


def test_unknown_targets_are_refused() -> None:
    for name in ("cuda", "cuda:x", "metal:1", "hip:"):
        with pytest.raises(CodegenError, match="unknown GPU target"):
            parse_target(name)
    with pytest.raises(CodegenError, match="no cost model"):
        card_of("cuda:75")
