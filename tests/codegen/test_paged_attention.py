"""Paged attention against its eager reference: mixed batches, masks, odd sizes, invariance."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import pytest
import torch

from aios_compile.codegen.cpp import build, paged_attention
from aios_compile.ir import ops  # noqa: F401  (registers the ops)
from aios_compile.ir.quantized import LARGEST_CODE, quantize_groups
from tests.codegen.harness import Kernel, make_body, sparse
from tests.variants import nightly

PAGE, POOL = 16, 200
SLOPES = (0.5, 0.17677669, 0.0625, -0.01)


@functools.cache
def kernel(heads, kv_heads, width, v_width, dtype, target=None, **options):
    spec = spec_of(heads, kv_heads, width, v_width, dtype, **options)
    return spec, Kernel(paged_attention.emit(spec), target and build.Target.named(target))


@functools.cache
def spec_of(heads, kv_heads, width, v_width, dtype, sinks=False, page=PAGE, pages=6, **options):
    codes = dtype in LARGEST_CODE

    def body(q, k_cache, v_cache, starts, lengths, tables, *rest):
        return torch.ops.aios.paged_attention.default(
            q, k_cache, v_cache, starts, lengths, tables, 0.3,
            options.get("window"), options.get("softcap"), options.get("chunk"),
            rest[0] if sinks else None, options.get("alibi"), *(rest[-2:] if codes else ()),
            **({"rounded": True} if options.get("rounded") else {}),
        )  # fmt: skip

    def plain(q, k_cache, v_cache, starts, lengths, tables):
        return body(q, k_cache, v_cache, starts, lengths, tables)

    def with_sinks(q, k_cache, v_cache, starts, lengths, tables, sinks):
        return body(q, k_cache, v_cache, starts, lengths, tables, sinks)

    def scaled(q, k_cache, v_cache, starts, lengths, tables, k_scales, v_scales):
        return body(q, k_cache, v_cache, starts, lengths, tables, k_scales, v_scales)

    def both(q, k_cache, v_cache, starts, lengths, tables, sinks, k_scales, v_scales):
        return body(q, k_cache, v_cache, starts, lengths, tables, sinks, k_scales, v_scales)

    row = (heads + 2 * kv_heads) * width
    inputs = {
        "q": (("T", heads, width), torch.float32),
        "k_cache": ((POOL, kv_heads, width, page), dtype),
        "v_cache": ((POOL, kv_heads, page, v_width), dtype),
        "starts": ((6,), torch.int64),
        "lengths": (("S",), torch.int64),
        "tables": (("S", pages), torch.int64),
    }
    if sinks:
        inputs["sinks"] = ((heads,), torch.float32)
    if codes:
        inputs |= dict.fromkeys(("ks", "vs"), ((POOL, kv_heads, page), torch.float32))
    function = {(0, 0): plain, (1, 0): with_sinks, (0, 1): scaled, (1, 1): both}[sinks, codes]
    graph, operands = make_body(function, inputs, {"q": (row, width, 1)})
    spec = paged_attention.spec_of(graph, operands)
    assert spec is not None
    return spec


class Batch:
    """Sequences with (new tokens, tokens in cache): pages shuffled, unused slots poisoned."""

    def __init__(
        self, sequences, heads, kv_heads, width, v_width, dtype, seed=0, page=PAGE, pages=6
    ):
        g = torch.Generator().manual_seed(seed)
        total = sum(new for new, _ in sequences)
        row = (heads + 2 * kv_heads) * width
        merged = torch.randn(total + 1, row, generator=g)
        self.q = merged[:total].as_strided((total, heads, width), (row, width, 1))
        unused = -128 if dtype == torch.int8 else float("nan")
        self.k = torch.full((POOL, kv_heads, width, page), unused, dtype=dtype)
        self.v = torch.full((POOL, kv_heads, page, v_width), unused, dtype=dtype)
        shape = (POOL, kv_heads, page)
        self.scales = [torch.full(shape, float("nan")) for _ in range(2 * (dtype in LARGEST_CODE))]
        self.starts = torch.zeros(len(sequences) + 1, dtype=torch.int64)
        self.starts[1:] = torch.tensor([new for new, _ in sequences]).cumsum(0)
        self.lengths = torch.tensor([context for _, context in sequences])
        order = (torch.randperm(POOL - 1, generator=g) + 1).tolist()
        self.tables = torch.zeros(len(sequences), pages, dtype=torch.int64)
        for s, (_, context) in enumerate(sequences):
            for i in range(-(-context // page)):
                self.tables[s, i] = order.pop()
            for t in range(context):
                at = self.tables[s, t // page]
                k = torch.randn(kv_heads, width, generator=g)
                v = torch.randn(kv_heads, v_width, generator=g)
                if self.scales:
                    k, self.scales[0][at, :, t % page] = quantize_groups(k, dtype)
                    v, self.scales[1][at, :, t % page] = quantize_groups(v, dtype)
                self.k[at, :, :, t % page] = k.to(dtype)
                self.v[at, :, t % page] = v.to(dtype)
        self.sinks = torch.randn(heads, generator=g)
        self.shape = (total, heads, v_width)

    def arguments(self, sinks=False):
        tensors = [self.q, self.k, self.v, self.starts, self.lengths, self.tables]
        return [*tensors, *([self.sinks] if sinks else []), *self.scales]

    def run(self, built, sinks=False, splits=1):
        out = torch.full(self.shape, float("nan"))
        sizes = {"T": self.shape[0], "S": len(self.lengths), "R": 1, "P": self.tables.shape[1]}
        built(sizes, *self.arguments(sinks), out, splits=splits)
        return out


MIXED = ((1, 1), (1, 37), (16, 16), (21, 50), (1, 90))


@pytest.mark.parametrize(
    ("shape", "dtype", "target"),
    [
        *(((3, 1, 20, 13), d, "avx512") for d in (torch.float32, torch.bfloat16, torch.float16)),
        ((3, 1, 20, 13), torch.bfloat16, "avx2"),
        ((3, 1, 20, 13), torch.bfloat16, "portable"),
        ((16, 8, 128, 128), torch.bfloat16, "avx512"),
        *(((3, 1, 20, 13), torch.int8, t) for t in ("avx512", "portable")),
        ((3, 1, 20, 13), torch.float8_e4m3fn, "avx512"),
        *nightly(
            ((4, 2, 32, 32), torch.float16, "avx2"),
            ((16, 8, 128, 128), torch.bfloat16, "avx2"),
            ((3, 1, 20, 13), torch.int8, "avx2"),
            ((16, 8, 128, 128), torch.int8, "avx512"),
            ((3, 1, 20, 13), torch.float8_e4m3fn, "avx2"),
            ((3, 1, 20, 13), torch.float8_e4m3fn, "portable"),
            ((16, 8, 128, 128), torch.float8_e4m3fn, "avx512"),
        ),
    ],
)
def test_mixed_batch_matches_the_reference(shape, dtype, target):
    if build.Target.named(target).vector_bytes > build.Target.host().vector_bytes:
        pytest.skip("the processor lacks the instructions")
    spec, built = kernel(*shape, dtype, target)
    batch = Batch(MIXED, *shape, dtype)
    expected = paged_attention.reference(spec, *batch.arguments())
    torch.testing.assert_close(batch.run(built), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"chunk": 8}, {"window": 20, "softcap": 2.0, "sinks": True},
     {"alibi": SLOPES, "window": 19, "softcap": 2.0},
     {"dtype": torch.int8, "window": 20, "softcap": 2.0, "sinks": True, "page": 32},
     *nightly({"window": 16}, {"window": 19}, {"chunk": 32}, {"softcap": 5.0}, {"alibi": SLOPES},
              {"sinks": True}, {"page": 32})],
    ids=str,
)  # fmt: skip
def test_masks_softcap_sinks(options):
    shape = (4, 2, 24, 40)
    options = {"dtype": torch.float32, **options}
    spec, built = kernel(*shape, **options)
    batch = Batch(MIXED, *shape, options["dtype"], page=options.get("page", PAGE))
    sinks = options.get("sinks", False)
    expected = paged_attention.reference(spec, *batch.arguments(sinks))
    torch.testing.assert_close(batch.run(built, sinks), expected, atol=2e-5, rtol=2e-5)


# The rounded products of a step: error of a probability in bf16; of 16 bits under a scale.
ROUNDED = {torch.bfloat16: 2.0**-8, torch.int8: 2e-4}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.bfloat16, {}), (torch.int8, {"window": 20, "softcap": 2.0, "sinks": True}),
     *nightly((torch.bfloat16, {"page": 32, "window": 19}), (torch.int8, {"page": 32}))],
    ids=str,
)  # fmt: skip
def test_rounded_products_on_all_targets(dtype, options):
    """Within what rounding may change; the text for processors without dot products agrees."""
    shape, sinks = (6, 2, 36, 64), options.get("sinks", False)
    batch = Batch(MIXED, *shape, dtype, page=options.get("page", PAGE))
    got = {}
    for name in ("avx512bf16", "avx2", "portable"):
        if build.Target.named(name).vector_bytes > build.Target.host().vector_bytes:
            continue
        if name == "avx512bf16" and not build.Target.host().bf16_dot:
            continue
        spec, built = kernel(*shape, dtype, name, rounded=True, **options)
        assert spec.products.name == ("codes" if dtype == torch.int8 else "pairs")
        expected = paged_attention.reference(spec, *batch.arguments(sinks))
        got[name] = batch.run(built, sinks)
        assert (got[name] - expected).abs().max() < ROUNDED[dtype]
        torch.testing.assert_close(got[name], got[next(iter(got))], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 19}, {"dtype": torch.int8, "window": 19}, {"rounded": True},
     {"dtype": torch.int8, "rounded": True},
     *nightly({"chunk": 24}, {"alibi": SLOPES}, {"dtype": torch.float8_e4m3fn, "window": 19},
              {"rounded": True, "window": 19})],
    ids=str,
)  # fmt: skip
def test_a_row_does_not_depend_on_batch_chunk_or_split(options):
    shape = (4, 2, 24, 64 if options.get("rounded") else 40)
    options = {"dtype": torch.bfloat16, **options}
    _, built = kernel(*shape, **options)
    batch = Batch(MIXED, *shape, options["dtype"])
    whole = batch.run(built)
    for splits in (2, 3, 7, 80):
        assert torch.equal(whole, batch.run(built, splits=splits))
    for s, (new, context) in enumerate(MIXED):  # alone, and each token as a step of its own
        first = int(batch.starts[s])
        for t in range(new):
            alone = Batch(((1, 1),), *shape, options["dtype"])
            alone.q, alone.k, alone.v = batch.q[first + t :][:1], batch.k, batch.v
            alone.scales = batch.scales
            alone.tables = batch.tables[s : s + 1]
            alone.lengths = torch.tensor([context - new + t + 1])
            assert torch.equal(alone.run(built)[0], whole[first + t])


LONG = ((1, 1300), (3, 514), (1, 40), (2, 1025))  # several spans of 512 tokens, and one


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.int8, "sinks": True},
     *nightly({"dtype": torch.bfloat16, "rounded": True}, {"dtype": torch.int8, "rounded": True},
              {"window": 530}, {"chunk": 600}, {"sinks": True}, {"page": 32}, {"alibi": SLOPES})],
    ids=str,
)  # fmt: skip
def test_long_contexts_are_shared_out_by_spans(options):
    """A few tokens: their spans go side by side. The same bits as in a step of many tokens."""
    rounded, sinks = options.get("rounded", False), options.get("sinks", False)
    shape = (4, 2, 24, 64 if rounded else 40)
    pages = 96 * PAGE // options.get("page", PAGE)
    options = {"dtype": torch.float32, **options}
    spec, built = kernel(*shape, pages=pages, **options)
    assert paged_attention.max_spans(spec) == 3 and built.source.finishes
    batch = Batch(LONG, *shape, options["dtype"], page=options.get("page", PAGE), pages=pages)
    few = batch.run(built, sinks)
    expected = paged_attention.reference(spec, *batch.arguments(sinks))
    near = ROUNDED[options["dtype"]] if rounded else 2e-5
    torch.testing.assert_close(few, expected, atol=near, rtol=2e-5)
    for splits in (2, 5, 40):
        assert torch.equal(few, batch.run(built, sinks, splits=splits))
    rows = len(few)  # then padding, so that the step has more tokens than are shared out
    row = batch.q.stride(0)
    padded = torch.zeros(rows + 20, row)
    padded[:rows, : batch.q[0].numel()] = batch.q.reshape(rows, -1)
    batch.q, batch.shape = (
        padded.as_strided((rows + 20, 4, 24), (row, 24, 1)),
        (rows + 20, *shape[::3]),
    )
    many = batch.run(built, sinks, splits=3)
    assert torch.equal(many[:rows], few) and not many[rows:].any()


def test_no_worker_does_the_share_of_another(monkeypatch):
    """What two halves of the items write is all of the output, and no element twice."""
    shape = (4, 2, 24, 40)
    _, built = kernel(*shape, torch.float32, pages=96)
    batch = Batch(((1, 30), (2, 20), (1, 40)), *shape, torch.float32, pages=96)
    written = []
    for half in (0, 1):

        def run_half(run, n, p, items, splits, half=half):
            run(ctypes.byref(n), p, *(ctypes.c_int64(items * (half + i) // 2) for i in (0, 1)))

        monkeypatch.setattr(Kernel, "_share", staticmethod(run_half))
        written.append(batch.run(built).isfinite())
    assert torch.equal(written[0], ~written[1]) and written[0].any() and written[1].any()


def test_padding_tokens_get_zeros():
    shape = (4, 2, 24, 40)
    _, built = kernel(*shape, torch.float32)
    batch = Batch(((3, 3), (2, 20)), *shape, torch.float32)
    batch.starts = torch.tensor([0, 3, 3])  # tokens 3 and 4 belong to nobody
    out = batch.run(built)
    assert torch.equal(out[3:], torch.zeros_like(out[3:])) and out[:3].isfinite().all()


def test_pages_beyond_two_to_the_31_elements():
    """The batch's pages moved to the far end of caches of 2^31 elements and more."""
    shape = (4, 2, 24, 40)
    _, built = kernel(*shape, torch.bfloat16)
    batch = Batch(((1, 37),), *shape, torch.bfloat16)
    expected = batch.run(built)
    pages = 2**31 // (2 * 16 * 24) + POOL + 10
    k = torch.from_numpy(sparse((pages, 2, 24, PAGE), np.int16)).view(torch.bfloat16)
    v = torch.from_numpy(sparse((pages, 2, PAGE, 40), np.int16)).view(torch.bfloat16)
    assert k[-POOL:].storage_offset() > 2**31 - 2**20 and v.numel() > 2**31
    k[-POOL:], v[-POOL:] = batch.k, batch.v
    batch.k, batch.v, batch.tables = k, v, batch.tables + pages - POOL
    assert torch.equal(batch.run(built), expected)


@pytest.mark.parametrize("what", ["query", "key"])
def test_a_nan_reaches_the_rows_that_see_it_and_no_other(what):
    shape, dtype = (4, 2, 24, 40), torch.bfloat16
    _, built = kernel(*shape, dtype)
    batch = Batch(MIXED, *shape, dtype)
    whole = batch.run(built)
    if what == "query":
        batch.q[3, 1, 5] = float("nan")
        touched = [(3, 1)]
    else:  # the tenth token of the third sequence, whose 16 new tokens are all that it has
        at = batch.tables[2, 0]
        batch.k[at, 1, :, 9] = float("nan")
        first = int(batch.starts[2])
        touched = [(first + t, h) for t in range(9, 16) for h in (2, 3)]
    found = batch.run(built)
    for t in range(whole.shape[0]):
        for h in range(whole.shape[1]):
            if (t, h) in touched:
                assert found[t, h].isnan().all()
            else:
                assert torch.equal(found[t, h], whole[t, h]), (t, h)
