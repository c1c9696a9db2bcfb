"""The kernel that writes keys and values and attends, in the interpreter: masks, splits, bits."""

from __future__ import annotations

import functools

import pytest
import torch

from aios_compile.ir import ops  # noqa: F401  (registers the ops)
from aios_compile.ir.quantized import LARGEST_CODE, quantize_groups
from tests.codegen.harness import make_body
from tests.codegen.test_paged_attention import PAGE, POOL, Batch

pytest.importorskip("triton")

from aios_compile.codegen.triton import kv_write_attention, paged_attention
from aios_compile.codegen.triton.choice import Tuning
from aios_compile.codegen.triton.kernel_ledger import Entry, KernelLedger
from aios_compile.codegen.triton.launch_forms import choose
from tests.codegen.triton_kernels import Kernel
from tests.codegen.triton_modules import poisoned
from tests.variants import nightly

aios = torch.ops.aios
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
SHAPE = (4, 2, 24, 40)
MIXED = ((1, 1), (1, 34), (11, 44))  # two decodes, and a chunk in two blocks and two segments


def body_of(norms, rotated, options, quantized=False):
    """Return a layer's step from the merged projection to the attention's result."""
    options = dict(options)

    def prepare(x, weight, cos, sin):
        x = aios.rms_norm.default(x, weight, 1e-6, True) if norms else x
        return aios.rope.default(x, cos, sin, False) if rotated else x

    def function(q, k, v, qw, kw, cos, sin, k_cache, v_cache, slots, starts, lengths, tables):
        k = prepare(k, kw, cos, sin)
        written = aios.kv_write.default(k, v, k_cache, v_cache, slots)
        out = attend(prepare(q, qw, cos, sin), written, starts, lengths, tables)
        return written[0], written[1], out

    def codes(q, k, v, qw, kw, cos, sin, k_cache, v_cache, ks, vs, slots, starts, lengths, tables):
        k = prepare(k, kw, cos, sin)
        written = aios.quantized_kv_write.default(k, v, k_cache, v_cache, ks, vs, slots)
        out = attend(prepare(q, qw, cos, sin), written, starts, lengths, tables)
        return written[0], written[1], written[2], written[3], out

    def attend(q, written, starts, lengths, tables):
        scales = {"k_scales": written[2], "v_scales": written[3]} if quantized else {}
        return aios.paged_attention.default(
            q, written[0], written[1], starts, lengths, tables, 0.3, options.get("window"),
            options.get("softcap"), options.get("chunk"), None, options.get("alibi"), **scales,
        )  # fmt: skip

    return codes if quantized else function


@functools.cache
def made(norms, rotated, dtype, fused=True, split=128, options=(), timed=0):
    heads, kv_heads, width, v_width = SHAPE
    quantized = dtype in LARGEST_CODE
    row = heads * width + kv_heads * (width + v_width)
    inputs = {
        "q": (("T", heads, width), f32),
        "k": (("T", kv_heads, width), f32),
        "v": (("T", kv_heads, v_width), f32),
        "qw": ((width,), bf16),
        "kw": ((width,), f32),
        "cos": (("T", 16), f32),
        "sin": (("T", 16), f32),
        "k_cache": ((POOL, kv_heads, width, PAGE), dtype),
        "v_cache": ((POOL, kv_heads, PAGE, v_width), dtype),
        **dict.fromkeys(("ks", "vs") if quantized else (), ((POOL, kv_heads, PAGE), f32)),
        "slots": (("T",), torch.int64),
        "starts": ((6,), torch.int64),
        "lengths": (("S",), torch.int64),
        "tables": (("S", 6), torch.int64),
    }
    strides = {"q": (row, width, 1), "k": (row, width, 1), "v": (row, v_width, 1)}
    body, operands = make_body(body_of(norms, rotated, options, quantized), inputs, strides)
    spec = kv_write_attention.spec_of(body, operands)
    assert spec is not None and paged_attention.spec_of(body, operands) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "SEGMENT", 32)
        patch.setattr(paged_attention, "WHOLE_ROWS", 16)
        patch.setattr(paged_attention, "PROGRAMS", 6)  # fewer than there are units
        patch.setattr(paged_attention, "MAX_SPLIT_TOKENS", split)
        patch.setattr(kv_write_attention, "NEW_TOKENS", 128 if fused else 0)
        source = kv_write_attention.emit(spec, tuning=Tuning(timed=timed) if timed else None)
    assert source.inplace == tuple((i, 7 + i) for i in range(4 if quantized else 2))
    return body, Kernel(source)


class Step:
    """A batch whose new positions hold NaN until they are written."""

    def __init__(self, sequences, dtype):
        heads, kv_heads, width, v_width = SHAPE
        self.in_codes = dtype in LARGEST_CODE
        self.batch = batch = Batch(sequences, *SHAPE, f32 if self.in_codes else dtype)
        total, g = batch.shape[0], torch.Generator().manual_seed(3)
        row = heads * width + kv_heads * (width + v_width)
        merged = torch.randn(total, row, generator=g)
        ends = (heads * width, (heads + kv_heads) * width, row)
        parts = [merged[:, a:b] for a, b in zip((0, *ends), ends)]
        widths = (width, width, v_width)
        self.rows = [
            p.as_strided((total, p.shape[1] // w, w), (row, w, 1)) for p, w in zip(parts, widths)
        ]
        angles = torch.randn(total, 16, generator=g)
        self.weights = [torch.randn(width, generator=g).bfloat16(), torch.randn(width, generator=g)]
        self.tables = [angles.cos(), angles.sin()]
        self.slots = torch.zeros(total, dtype=torch.int64)
        for s, (new, context) in enumerate(sequences):
            for i, n in enumerate(range(context - new, context)):
                page, t = batch.tables[s, n // PAGE], int(batch.starts[s]) + i
                self.slots[t] = page * PAGE + n % PAGE
                batch.k[page, :, :, n % PAGE] = float("nan")
                batch.v[page, :, n % PAGE] = float("nan")
        self.states = [batch.k, batch.v]
        if self.in_codes:
            keys, k_scales = quantize_groups(batch.k.transpose(2, 3).contiguous(), dtype)
            values, v_scales = quantize_groups(batch.v, dtype)
            self.states = [keys.transpose(2, 3).contiguous(), values, k_scales, v_scales]

    def arguments(self):
        b = self.batch
        caches = [state.clone() for state in self.states]
        lists = [self.slots, b.starts, b.lengths, b.tables]
        return [*self.rows, *self.weights, *self.tables, *caches, *lists]

    def run(self, built):
        arguments, out = self.arguments(), torch.full(self.batch.shape, float("nan"))
        sizes = {"T": self.batch.shape[0], "S": len(self.batch.lengths), "P": 6}
        states = arguments[7 : 7 + len(self.states)]
        built(sizes, *arguments, *states, out)
        return *states, out


@pytest.mark.parametrize(
    ("norms", "rotated", "dtype", "options"),
    [
        (True, True, f32, ()),
        (True, False, f16, (("window", 19),)),
        (False, True, bf16, (("chunk", 24), ("softcap", 5.0))),
        (False, False, f32, (("alibi", (0.5, 0.25, 0.125, 0.0625)),)),
    ],
    ids=str,
)
def test_a_mixed_batch_is_the_reference_in_one_launch_and_in_two(norms, rotated, dtype, options):
    """What is written and what is attended to are the same bits, however the work is cut."""
    step, results = Step(MIXED, dtype), []
    for fused, split, launches in ((True, 128, 1), (False, 128 if rotated else 1, 2)):
        body, built = made(norms, rotated, dtype, fused, split, options)
        variant = next(v for v in built.module.VARIANTS if v["most"] is None or v["most"] >= 13)
        assert len(variant["launches"]) == launches
        results.append(step.run(built))
    for result in results[1:]:
        for ours, first in zip(result, results[0]):
            assert torch.equal(ours.nan_to_num(7.0), first.nan_to_num(7.0))
    tolerance = {f32: 3e-5, f16: 4e-3, bf16: 3e-2}[dtype]
    for ours, expected in zip(results[0], body(*step.arguments())):
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype in LARGEST_CODE else tensor.nan_to_num(7.0)


@pytest.mark.parametrize("dtype", list(LARGEST_CODE), ids=str)
def test_pages_of_codes_hold_the_definitions_codes_and_scales(dtype):
    """A product that is rounded otherwise may move a code by one; the answer is that of bf16."""
    step, results = Step(MIXED, dtype), []
    for fused, split in ((True, 128), (False, 1)):
        body, built = made(True, True, dtype, fused, split)
        results.append(step.run(built))
    for ours, others in zip(*results):
        assert torch.equal(bits(ours), bits(others))
    expected = body(*step.arguments())
    for ours, wanted in zip(results[0][:2], expected[:2]):
        assert (bits(ours).int() - bits(wanted).int()).abs().remainder(255).max() <= 1
        assert (bits(ours) == bits(wanted)).float().mean() > 0.999
    for ours, wanted in zip(results[0][2:4], expected[2:4]):
        torch.testing.assert_close(ours, wanted, atol=1e-7, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(results[0][4], expected[4], atol=3e-2, rtol=3e-2)


def test_decodes_of_a_batch_are_those_of_single_steps():
    sequences = ((1, 1), (1, 33), (1, 90))
    _, built = made(True, True, f32)
    step = Step(sequences, f32)
    together = step.run(built)[2]
    for s, sequence in enumerate(sequences):
        alone = Step((sequence,), f32)
        for name in ("rows", "tables"):
            setattr(alone, name, [x[s : s + 1] for x in getattr(step, name)])
        alone.weights, alone.slots = step.weights, step.slots[s : s + 1]
        alone.states = step.states
        alone.batch.tables = step.batch.tables[s : s + 1]
        assert torch.equal(alone.run(built)[2][0], together[s])


@pytest.mark.parametrize("split", [128, *nightly(8)])
def test_every_form_of_the_launches_gives_the_same_bits(split: int) -> None:
    """Half as many programs and twice as many share the same segments. Stages of loads are the
    compiler's: the interpreter runs one form of each grid.
    """
    _, built = made(True, True, bf16, fused=split == 128, split=split, timed=9)
    step, sizes = Step(MIXED, bf16), {"T": 13, "S": 3, "P": 6}
    variant = built.module.variant_of(**sizes)
    forms = {variant["name"]: variant["launches"], **variant["candidates"]}
    assert set(variant["candidates"]) <= {c.name for c in built.source.candidates}
    assert len(forms) == (9 if split == 128 else 3)
    assert all(len(launches) == len(variant["launches"]) for launches in forms.values())
    grids = {tuple(x["grid"](13, 3, 1, 6) for x in forms[name]): name for name in forms}
    assert len(grids) == (3 if split == 128 else 1), "3, 2 and 6 programs for each of two heads"
    results = []
    for name in grids.values():
        tensors, out = step.arguments(), poisoned(step.batch.shape)
        caches = tensors[7:9]
        built({**sizes, "candidate": name}, *tensors, *caches, out)
        results.append((*caches, out))
    assert not results[0][-1].isnan().any()
    for found in results:
        for got, wanted in zip(found, results[0]):
            assert torch.equal(got.nan_to_num(-7.0), wanted.nan_to_num(-7.0))


def test_a_form_that_was_measured_is_emitted_alone() -> None:
    _, built = made(True, True, bf16, timed=9)
    (place,) = {c.type for c in built.source.candidates}
    first = built.module.VARIANTS[0]
    assert place.startswith("kv_write_attention 4/2 heads of 24 and 40, pages of 16 bf16, 3 x 32")
    every = {first["name"]: "standard", **dict.fromkeys(first["candidates"], "other")}
    chosen = list(every)[-1]
    entry = Entry(chosen, 1, 300.0, 1.02, 25)
    ledger = KernelLedger("g", "t", "3.7", "today", {place: {str(first["most"]): entry}})
    found = choose(every, place, first["most"], Tuning(ledger=ledger, timed=2))
    assert (found.chosen, found.name, found.others) == ("other", chosen, {})
    rest = choose(every, place, None, Tuning(ledger=ledger, timed=2))
    assert rest.chosen == "standard" and len(rest.others) == 2
    gone = KernelLedger("g", "t", "3.7", "today", {place: {"any": Entry("9 programs", 1, 1, 1, 9)}})
    assert choose(every, place, None, Tuning(ledger=gone, timed=2)) == rest
