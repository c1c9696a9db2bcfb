"""Pointwise kernels against eager and the spec's reference: strides, broadcasts, views, gathers."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aios_compile.codegen.cpp import build, pointwise
from aios_compile.codegen.expression import TORCH_DTYPES
from aios_compile.codegen.operand import Operand, SizeExpr
from tests.codegen.kernels import Sizes, call, example, library, operands_of, run, trace

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
i64, i32, boolean = torch.int64, torch.int32, torch.bool
TOKENS = (1, 5, 37)
T300 = SizeExpr(((("T",), 300),))


@dataclass(frozen=True)
class Case:
    function: Callable[..., Any]
    inputs: Sequence[tuple[Sequence[Any], torch.dtype]]
    strides: dict[int, Sequence[Any]] = field(default_factory=dict)
    tolerance: float = 2e-6


CASES = {
    "swiglu": Case(lambda g, u: F.silu(g) * u, [(("T", 70), f32), (("T", 70), f32)]),
    "merged_halves": Case(
        lambda gu: F.silu(gu[:, :35]) * gu[:, 35:], [(("T", 70), f32)], {0: (150, 1)}
    ),
    "column_major": Case(lambda x: x + 1, [((33, "T"), f32)], {0: (1, 40)}),
    "token_stride": Case(lambda x, y: x - y, [(("T", 33), f32), ((33,), f32)], {0: (T300, 2)}),
    "row_and_column": Case(lambda x, y: x * y, [(("T", 1), f32), ((1, 33), f32)]),
    "scalar_operand": Case(lambda x, y: x * y, [(("T", 33), f32), ((), f32)]),
    "one_dimension": Case(lambda x: x.abs().sqrt(), [(("T",), f32)]),
    "long_row": Case(lambda x: x * 2 + 1, [((20000,), f32)]),
    "gelu_bias": Case(lambda x, b: F.gelu(x + b), [(("T", 3, 33), f32), ((33,), f32)]),
    "gelu_tanh": Case(lambda x: F.gelu(x, approximate="tanh"), [(("T", 33), f32)]),
    "angles": Case(lambda p, f: (p[:, None] * f).cos(), [(("T",), i64), ((33,), f32)]),
    "rotate_half": Case(
        lambda x: torch.cat((-x[..., 16:], x[..., :16]), -1), [(("T", 3, 32), f32)]
    ),
    "cat_of_tokens": Case(lambda x, y: torch.cat((x, y), 0), [(("T", 9), f32), ((4, 9), f32)]),
    "stack_interleaved": Case(
        lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2), [(("T", 32), f32)]
    ),
    "heads_first": Case(lambda x: x.view(-1, 4, 8).permute(1, 0, 2) + 1, [(("T", 32), f32)]),
    "heads_last": Case(lambda x: x.permute(1, 0, 2).reshape(-1, 32) * 2, [((4, "T", 8), f32)]),
    "group_mask": Case(
        lambda x, i: torch.zeros_like(x).scatter(1, i.abs() % 9, 1.0) * x,
        [(("T", 9), f32), (("T", 3), i64)],
    ),
    "scatter_last_wins": Case(
        lambda x, i, y: x.scatter(1, i.abs() % 4, y),
        [(("T", 9), f32), (("T", 5), i64), (("T", 5), f32)],
    ),
    "scatter_add": Case(
        lambda x, i, y: x.scatter_add(1, i.abs() % 4, y),
        [(("T", 9), f32), (("T", 5), i64), (("T", 5), f32)],
    ),
    "slice_scatter": Case(
        lambda x, y: torch.slice_scatter(x, y, 1, 3, 8) + 1,
        [(("T", 10), f32), (("T", 5), f32)],
    ),
    "slice_scatter_flipped": Case(  # no cut of the loop says which part is read
        lambda x, y: torch.slice_scatter(x, y, 1, 3, 8).flip(1) + 1,
        [(("T", 10), f32), (("T", 5), f32)],
    ),
    "pad": Case(lambda x: F.pad(x, (3, 2)) + 1, [(("T", 30), f32)]),
    "split_parts": Case(lambda x: torch.split(x, [10, 23], -1)[1] * 2, [(("T", 33), f32)]),
    "flip": Case(lambda x: x.flip(-1), [(("T", 33), f32)]),
    "causal_mask": Case(
        lambda p: torch.where(torch.arange(p.shape[0])[None] <= p[:, None], 0.0, -1e9),
        [(("T",), i64)],
    ),
    "tril": Case(lambda x: x.tril(-1), [((19, 23), f32)]),
    "index_rows": Case(lambda i, w: w[i] * 2, [(("T",), i64), ((40, 20), f32)]),
    "index_columns": Case(lambda w, i: w[:, i.abs() % 5] + 1, [((7, 5), f32), (("T",), i64)]),
    "index_apart": Case(
        lambda w, i: w[i.abs() % 7, :, i.abs() % 5] + 1, [((7, 3, 5), f32), (("T",), i64)]
    ),
    "index_select": Case(lambda w, i: w.index_select(1, i.abs()), [((7, 20), f32), (("T",), i64)]),
    "gather": Case(lambda w, i: w.gather(-1, i.abs()), [(("T", 20), f32), (("T", 5), i64)]),
    "two_outputs": Case(lambda x, y: (x + y, x * y), [(("T", 33), f32), (("T", 33), f32)]),
    "constant_output": Case(lambda x: (torch.zeros_like(x), x + 1), [(("T", 33), f32)]),
    "masks": Case(
        lambda x, m: torch.where(m & ~(x > 1), x, -x).masked_fill(x < -1, 3.0),
        [(("T", 33), f32), (("T", 33), boolean)],
    ),
    "whole_numbers": Case(
        lambda a, b: (a // 3 + b % 4, a * b - (a >> 1), (a == b) | (a > 3)),
        [(("T", 9), i64), (("T", 9), i64)],
    ),
    "small_integers": Case(lambda a: (a * 3).float() + 0.5, [(("T", 33), i32)]),
    "bf16_storage": Case(lambda x, y: x.float() * y, [(("T", 33), bf16), (("T", 33), f32)]),
    "bf16_rounds": Case(lambda x, y: (x * y) + x, [(("T", 33), bf16), (("T", 33), bf16)]),
    "f16_rounds": Case(lambda x, y: (x * y) + x, [(("T", 33), f16), (("T", 33), f16)]),
    "double": Case(lambda x: (x * 3).float(), [(("T", 33), torch.float64)]),
}


@pytest.fixture(scope="module")
def built() -> tuple[dict[str, Any], dict[str, ctypes.CDLL]]:
    """Return every case's (body, spec, source), and one library of all kernels for each target."""
    made = {}
    for name, case in CASES.items():
        body = trace(case.function, *case.inputs)
        operands = operands_of(body, dict(case.strides))
        spec = pointwise.spec_of(body, operands)
        assert spec is not None, name
        made[name] = (body, spec, pointwise.emit(spec))
    sources = [source for _, _, source in made.values()]
    targets = {t.name: library(sources, t) for t in {build.Target.host(), PORTABLE}}
    return made, targets


PORTABLE = build.Target.named("portable")


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_eager_and_reference(name: str, built: Any) -> None:
    body, spec, source = built[0][name]
    count = len(CASES[name].inputs)
    for tokens in TOKENS:
        sizes = {"T": tokens}
        tensors = [
            example(o, sizes, TORCH_DTYPES[o.dtype], seed) for seed, o in enumerate(spec.operands)
        ]
        xs, outs = tensors[:count], tensors[count:]
        result = body(*xs)
        wanted: Sequence[Tensor] = result if isinstance(result, (tuple, list)) else [result]
        results = []
        for target, split in ((build.Target.host(), 1), (build.Target.host(), 3), (PORTABLE, 1)):
            for out in outs:
                out.copy_(torch.full_like(out, 7))
            call(built[1][target.name], source, [*xs, *outs], sizes, split)
            results.append([out.clone() for out in outs])
        tolerance = CASES[name].tolerance
        for got, want in zip(results[0], wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        for got, want in zip(pointwise.reference(spec, *xs), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        for other in results[1:]:  # neither the split nor the vector width changes a bit
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_the_other_rows(built: Any) -> None:
    _, _, source = built[0]["swiglu"]
    host = built[1][build.Target.host().name]
    gate, up, out = (torch.randn(37, 70) for _ in range(3))
    call(host, source, [gate, up, out], {"T": 37})
    alone = torch.empty(1, 70)
    call(host, source, [gate[9:10], up[9:10], alone], {"T": 1})
    assert torch.equal(alone[0], out[9])


def test_dense_operands_make_one_long_row(built: Any) -> None:
    """[T, 70] with no gaps is walked as one dimension, in pieces of 4096 elements."""
    _, spec, _ = built[0]["swiglu"]
    assert spec.shape == (SizeExpr(((("T",), 70),)),)


def test_in_place_pairs_are_read_and_written_at_one_index(built: Any) -> None:
    _, _, source = built[0]["two_outputs"]
    assert source.inplace == ((0, 0), (0, 1), (1, 0), (1, 1))
    x, y = torch.randn(5, 33), torch.randn(5, 33)
    want = (x + y, x * y)
    call(built[1][build.Target.host().name], source, [x, y, x, y], {"T": 5})
    assert torch.equal(x, want[0]) and torch.equal(y, want[1])
    assert built[0]["flip"][2].inplace == ()


def test_cat_has_no_select_in_its_loops(built: Any) -> None:
    assert "select" not in built[0]["rotate_half"][2].text


def test_text_is_deterministic_and_explains_itself(built: Any) -> None:
    _, spec, source = built[0]["swiglu"]
    again = pointwise.spec_of(trace(*_traced("swiglu")), list(spec.operands))
    assert again is not None and pointwise.emit(again).text == source.text
    assert "// out = silu(g_1) * u_1" in source.text


def _traced(name: str) -> tuple[Any, ...]:
    return CASES[name].function, *CASES[name].inputs


def test_a_body_that_mixes_rows_is_refused() -> None:
    body = trace(lambda x: x.cumsum(0), (("T", 9), f32))
    assert pointwise.spec_of(body, operands_of(body)) is None


@pytest.mark.parametrize(
    ("function", "indices"),
    [
        (lambda x, i, y: x.scatter(1, i, y), 65),  # 65 compares for each element
        (lambda x, i, y: x.scatter(1, i, y, reduce="multiply"), 5),
    ],
    ids=["many indices", "another reduction"],
)
def test_a_scatter_that_is_no_short_chain_is_refused(function: Any, indices: int) -> None:
    inputs = [(("T", 9), f32), (("T", indices), i64), (("T", indices), f32)]
    body = trace(function, *inputs)
    assert pointwise.spec_of(body, operands_of(body)) is None


def test_offsets_past_2_to_the_31_elements() -> None:
    """Row 2 starts 2^31 + 14 elements in: a 32-bit product would wrap. Few pages are touched."""
    body = trace(lambda x: x * 2, ((3, 20), f32))
    stride = 2**30 + 7
    operands = operands_of(body)
    far = Operand("x", "f32", (3, 20), (stride, 1))
    spec = pointwise.spec_of(
        body, [far, Operand("out", "f32", (3, 20), (stride, 1)), *operands[2:]]
    )
    assert spec is not None
    source = pointwise.emit(spec)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = [mmap.mmap(-1, 4 * (2 * stride + 20), flags=flags) for _ in range(2)]
    x, out = (np.frombuffer(m, np.float32) for m in memory)
    writable = x.view()
    for row in range(3):
        writable[row * stride : row * stride + 20] = np.arange(20) + row
    lib = library([source])
    pointers = (ctypes.c_void_p * 2)(x.ctypes.data, out.ctypes.data)
    getattr(lib, source.symbol)(
        ctypes.byref(Sizes(1, 1, 1, 1)), pointers, ctypes.c_int64(0), ctypes.c_int64(3)
    )
    for row in range(3):
        got = out[row * stride : row * stride + 20]
        np.testing.assert_array_equal(got, 2 * (np.arange(20) + row))


def test_runs_on_every_target_that_this_machine_has() -> None:
    body = trace(lambda x: F.gelu(x) + x.sin(), (("T", 37), f32))
    spec = pointwise.spec_of(body, operands_of(body))
    assert spec is not None
    x, results = torch.randn(5, 37), []
    for target, needs in build.TARGETS:
        if needs <= build.cpu_features():
            results.append(torch.empty(5, 37))
            run(pointwise.emit(spec), [x, results[-1]], {"T": 5}, target=target)
    assert all(torch.equal(results[0], other) for other in results)
