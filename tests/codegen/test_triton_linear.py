"""The Triton linear kernels in the interpreter: every variant, dtype, tail, border and stride."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from aios_compile.ir import ops  # noqa: F401  (registers the ops)
from tests.codegen.harness import make_body
from tests.codegen.test_linear import (
    activated_twice,
    gated,
    gated_by_slices,
    plain,
    with_bias_and_residual,
)
from tests.codegen.triton_modules import load, poisoned, run
from tests.variants import nightly

pytest.importorskip("triton")

from aios_compile.codegen.triton import choice, configs, cost_model, linear
from aios_compile.codegen.triton.cards import CARDS, DEFAULT
from aios_compile.codegen.triton.configs import Config
from aios_compile.errors import CodegenError

aios, aten = torch.ops.aios, torch.ops.aten
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
ROWS = Config("rows", 4, 4, 64, 2)
DOT = Config("dot", 16, 16, 32, 4)
SPLIT = Config("dot", 16, 16, 32, 4, 3, split=3)
TILE = Config("tile", 16, 32, 32, 4)
DESCRIPTOR = Config("descriptor", 16, 32, 32, 4)


def normed(x, w, g):
    return aios.linear.default(aios.rms_norm.default(x, g, 1e-3, True), w)


def normed_and_gated(x, w, g):
    return gated(aios.rms_norm.default(x, g, 1e-3, True), w)


@functools.cache
def made(function, rows, depth, dtypes=(f32, f32), config=None, row=None, extra=()):
    inputs = {"x": (("T", depth), dtypes[0]), "w": ((rows, depth), dtypes[1])}
    inputs |= {name: (shape, dtypes[0]) for name, shape in extra}
    body, operands = make_body(function, inputs, {"x": (row, 1)} if row else None)
    spec = linear.spec_of(body, operands)
    assert spec is not None
    source = linear.emit(spec) if config is None else linear.emit(spec, DEFAULT, ((None, config),))
    return spec, body, source, load(source)


def widened(body, *tensors):
    """Run the body in float32: the interpreter and the kernels sum there."""
    result = body(*(t.float() for t in tensors))
    return list(result) if isinstance(result, (tuple, list)) else [result]


def close(actual, expected, depth, dtype=f32):
    tolerance = {f32: 1e-5, bf16: 1e-2, f16: 2e-3}[dtype]
    torch.testing.assert_close(
        actual.float(), expected, atol=6e-5 * depth**0.5 + tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("config", [ROWS, DOT, SPLIT, TILE], ids=lambda c: f"{c.kind}{c.split}")
@pytest.mark.parametrize(
    "dtypes",
    [
        (f32, f32),
        (f32, bf16),
        (f16, f16),
        (bf16, bf16),
        *nightly(((f32, f16),), ((f16, bf16),), ((bf16, f32),)),
    ],
    ids=lambda d: "-".join(str(x)[6:] for x in d),
)
def test_plain_at_borders(config: Config, dtypes: Any) -> None:
    """37 columns and 51 inputs fill no block; x is a slice of a wider matrix."""
    rows, depth = 37, 51
    _, body, source, module = made(plain, rows, depth, dtypes, config, row=depth + 3)
    w, merged = torch.randn(rows, depth).to(dtypes[1]), torch.randn(40, depth + 3).to(dtypes[0])
    for tokens in (1, 3) if config.kind == "rows" else (1, 13) if config.kind == "dot" else (1, 37):
        x, out = merged[:tokens, :depth], poisoned((tokens, rows), dtypes[0])
        run(source, module, [x, w, out], T=tokens)
        close(out, widened(body, x, w)[0], depth, dtypes[0])


def test_descriptors_at_borders_and_with_tails() -> None:
    """42 columns and 56 inputs fill no block: what lies beyond comes as zeros."""
    for tokens in (1, 37):
        _, body, source, module = made(plain, 42, 56, (f32, bf16), DESCRIPTOR)
        x, w, out = torch.randn(tokens, 56), torch.randn(42, 56).bfloat16(), poisoned((tokens, 42))
        run(source, module, [x, w, out], T=tokens)
        close(out, widened(body, x, w)[0], 56)
    _, body, source, module = made(
        normed_and_gated, 40, 64, config=DESCRIPTOR, extra=(("g", (64,)),)
    )
    x, w, g, out = torch.randn(19, 64), torch.randn(40, 64), torch.randn(64), poisoned((19, 20))
    run(source, module, [x, w, g, out], T=19)
    close(out, widened(body, x, w, g)[0], 64)
    with pytest.raises(CodegenError, match="no tensor descriptors"):
        made(plain, 42, 51, (f32, bf16), DESCRIPTOR)


def test_the_librarys_product_takes_the_place_of_a_kernel() -> None:
    """Split x, multiply, add the parts and compute the tail; x is a slice of a wider matrix."""
    library = Config("library", 1, 1, 1, 4)
    for dtypes in ((f32, f32), (f32, bf16), (bf16, bf16)):
        _, body, source, module = made(plain, 37, 51, dtypes, library, row=54)
        merged, w = torch.randn(40, 54).to(dtypes[0]), torch.randn(37, 51).to(dtypes[1])
        for tokens in (1, 19):
            x, out = merged[:tokens, :51], poisoned((tokens, 37), dtypes[0])
            run(source, module, [x, w, out], T=tokens)
            close(out, widened(body, x, w)[0], 51, dtypes[0])
    extra = (("g", (64,)),)
    _, body, source, module = made(normed_and_gated, 40, 64, config=library, extra=extra)
    assert len(module.VARIANTS[0]["launches"]) == 4
    x, w, g, out = torch.randn(19, 64), torch.randn(40, 64), torch.randn(64), poisoned((19, 20))
    run(source, module, [x, w, g, out], T=19)
    close(out, widened(body, x, w, g)[0], 64)
    with pytest.raises(CodegenError, match="no library multiplies f32 x with f16 weights"):
        made(plain, 32, 64, (f32, f16), library)


def test_float32_activations_keep_their_precision_beside_half_weights() -> None:
    """Rounding x to bfloat16 would be off by 2^-9 of a term; two parts leave 2^-17."""
    for dtype, bound in ((bf16, 2e-5), (f16, 1e-6)):
        for config in (ROWS, DOT, TILE):
            _, _, source, module = made(plain, 32, 64, (f32, dtype), config)
            x, w = torch.randn(4, 64), torch.randn(32, 64).to(dtype)
            out = poisoned((4, 32))
            run(source, module, [x, w, out], T=4)
            exact, scale = x.double() @ w.double().T, x.abs().double() @ w.abs().double().T
            assert ((out - exact).abs() / scale).max() < bound


@pytest.mark.parametrize("config", [ROWS, DOT, SPLIT, TILE], ids=lambda c: f"{c.kind}{c.split}")
def test_tails(config: Config) -> None:
    rows, depth, tokens = 40, 64, 3
    extra = (("bias", (rows,)), ("residual", ("T", rows)))
    x, w = torch.randn(tokens, depth), torch.randn(rows, depth)
    bias, residual = torch.randn(rows), torch.randn(tokens, rows)
    _, body, source, module = made(with_bias_and_residual, rows, depth, config=config, extra=extra)
    assert source.inplace == ((0, 3),)
    (expected,) = widened(body, x, w, bias, residual)
    run(source, module, [x, w, bias, residual, residual], T=tokens)  # in place
    close(residual, expected, depth)
    _, body, source, module = made(activated_twice, rows, depth, config=config, extra=extra[:1])
    first, second = poisoned((tokens, rows)), poisoned((tokens, rows))
    run(source, module, [x, w, bias, first, second], T=tokens)
    for actual, wanted in zip((first, second), widened(body, x, w, bias)):
        close(actual, wanted, depth)
    for function, more in ((gated, ()), (gated_by_slices, (("scale", (21,)),))):
        spec, body, source, module = made(function, 42, depth, config=config, extra=more)
        assert spec.streams == 2
        halves, tail = torch.randn(42, depth), [torch.randn(21)] if more else []
        out = poisoned((tokens, 21))
        run(source, module, [x, halves, *tail, out], T=tokens)
        close(out, widened(body, x, halves, *tail)[0], depth)


@pytest.mark.parametrize("config", [ROWS, DOT, SPLIT, TILE], ids=lambda c: f"{c.kind}{c.split}")
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_a_norm_of_x_is_part_of_the_kernel(config: Config, dtype: torch.dtype) -> None:
    """One launch for few tokens; rows of unlike size, so that each needs its own scale."""
    for depth, row in ((51, 54), (64, None)):
        body, operands = make_body(
            normed_and_gated if row is None else normed,
            {"x": (("T", depth), f32), "w": ((38, depth), dtype), "g": ((depth,), f32)},
            {"x": (row, 1)} if row else None,
        )
        spec = linear.spec_of(body, operands)
        assert spec is not None and spec.norm is not None
        source = linear.emit(spec, DEFAULT, ((None, config),))
        module = load(source)
        assert len(module.VARIANTS[0]["launches"]) == 1 + (config.kind == "tile")
        for tokens in (1, 3):
            x = (torch.randn(tokens, row or depth) * 10.0 ** torch.arange(tokens)[:, None])[
                :, :depth
            ]
            w, g = torch.randn(38, depth).to(dtype), torch.randn(depth) / 4
            out = poisoned((tokens, 38 if row else 19))
            run(source, module, [x, w, g, out], T=tokens)
            close(out, widened(body, x, w, g)[0], depth)


def test_the_models_choice_serves_every_bucket_with_the_same_bits_again() -> None:
    spec, body, source, module = made(plain, 96, 80)
    w, x = torch.randn(96, 80), torch.randn(70, 80)
    for tokens in (1, 2, 16, 17, 33, 70):
        outs = [poisoned((tokens, 96)) for _ in range(2)]
        for out in outs:
            run(source, module, [x[:tokens], w, out], T=tokens)
        close(outs[0], widened(body, x[:tokens], w)[0], 80)
        assert torch.equal(*outs)
        if tokens in (2, 16):  # one variant: a row does not depend on the others
            alone = poisoned((2, 96))
            run(source, module, [x[:2], w, alone], T=2)
            assert torch.equal(alone, outs[0][:2])
    assert source == linear.emit(spec)


def test_rows_have_the_same_bits_within_a_class_of_steps() -> None:
    """The classes of docs/targets.md: a row beside more others, in other variants too."""
    spec, _, source, module = made(plain, 96, 640)
    w, x = torch.randn(96, 640), torch.randn(70, 640)
    kinds = {v["most"]: v["launches"][0]["kernel"].__name__ for v in module.VARIANTS}
    assert "_dot_" in kinds[16] and "_dot_" in kinds[32] and kinds[16] != kinds[32]
    for first, *others in ((2, 4), (5, 16, 17, 32), (33, 64), (65, 70)):
        rows = {}
        for tokens in (first, *others):
            rows[tokens] = poisoned((tokens, 96))
            run(source, module, [x[:tokens], w, rows[tokens]], T=tokens)
            assert torch.equal(rows[tokens][:first], rows[first])
    for card in CARDS.values():
        chosen = dict(linear.choose(spec, card))
        assert chosen[16].order == chosen[32].order


def test_refusals() -> None:
    inputs = {"x": (("T", 8), f32), "w": ((24, 8), f32)}
    for function, names in (
        (lambda x, w: aten.cumsum.default(aios.linear.default(x, w), 0), ()),
        (plain, ("w",)),  # packed for the CPU
        (lambda x, w: aten.neg.default(x), ()),
    ):
        body, operands = make_body(function, inputs, packed=names)
        assert linear.spec_of(body, operands) is None


def test_configurations_fit_the_card_and_order_by_cost() -> None:
    for card in CARDS.values():
        for columns, depth, streams in (
            (4096, 1024, 1),
            (3072, 1024, 2),
            (151936, 1024, 1),
            (7, 5, 1),
        ):
            problem = configs.Problem(columns, depth, streams, 2, 4, 2)
            floor = columns * streams * depth * 2 / card.bytes_per_us
            chosen = {found.most: found for found in choice.choose(problem, card)}
            for most, found in chosen.items():
                config = found.config
                if columns > 7:  # enough to choose from: no makeshift
                    assert config.kind == "rows" or config.block_t * config.block_n >= 16 * 16
                    assert most or config.block_t * config.block_n >= 64 * 64
                tokens = most or configs.PREFILL_TOKENS
                cost = cost_model.cost_us(config, problem, tokens, card)
                assert cost > floor, "faster than the memory"
                others = configs.candidates(problem, config.kind, tokens, card)
                if most in choice.FEWER and config.kind == "dot":  # of the order for 32 rows
                    others = [c for c in others if c.order == chosen[32].config.order]
                assert (
                    cost
                    == found.cost.us
                    == min(cost_model.cost_us(c, problem, tokens, card) for c in others)
                )
