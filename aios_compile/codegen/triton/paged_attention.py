"""out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h / G]) v[j, h / G] over the visible keys j.

The spec is the C++ target's (its file has the layouts and masks). A block is BLOCK_M rows = queries
x the heads of one key/value head. Up to SPLIT tokens a step: a unit of work is (block, segment of
keys); a fixed number of programs shares the units of all sequences evenly, whatever their lengths,
and the last unit of a block combines its segments in their order (stream-K's fixup, Osama et al.,
2023; split-KV, Flash-Decoding, 2023). Beyond: one program a block, which goes through the segments
by itself. Segments begin at multiples of SEGMENT keys, so both give a row the same sums in the same
order. All lengths are read on the device. Factors of the two products are rounded to the cache's
dtype, sums are float32. Bytes: K and V of a sequence once for each block of its queries; partial
results of (segments x queries) once more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from aios_compile.codegen.cpp import paged_attention
from aios_compile.codegen.cpp.head_rows import LARGEST_CODE
from aios_compile.codegen.cpp.paged_attention import PagedAttentionSpec
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.cards import DEFAULT, Card
from aios_compile.codegen.triton.choice import Tuning
from aios_compile.codegen.triton.frame import python_dim
from aios_compile.codegen.triton.launch_forms import choose
from aios_compile.codegen.triton.template import (
    Bound,
    Entry,
    Text,
    fixed,
    is_fixed,
    kernel,
    next_power_of_two,
)

PROGRAMS = 264  # two for each of 132 multiprocessors
MAX_SEGMENTS = 64  # of a sequence
SEGMENT = 256  # keys at least: a shorter one costs more in combining than it wins
MAX_PARTIAL_BYTES = 64 << 20
MAX_SPLIT_TOKENS = 128
WHOLE_ROWS = 64  # rows of a block when a program does it alone

Values = dict[str, Any]


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> Bound[PagedAttentionSpec] | None:
    """Return the spec of a body that is one aios.paged_attention, else None."""
    spec = paged_attention.spec_of(body, operands)
    return Bound(spec, tuple(operands)) if spec is not None and serves(spec) else None


def serves(spec: PagedAttentionSpec) -> bool:
    """Return whether every offset, stride and table width is a number."""
    optional = (spec.sinks, spec.k_scales, spec.v_scales)
    views = [*spec.inputs, *(view for view in optional if view is not None)]
    dims = [d for v in views for d in (v.offset, *v.operand.strides)]
    tables = spec.inputs[5].operand
    return is_fixed(*dims, *spec.out.strides, *tables.shape[1:])


def reference(spec: Bound[PagedAttentionSpec], *tensors: Tensor) -> Tensor:
    """Compute the kernel's output in eager PyTorch; tensors in the op's order."""
    return paged_attention.reference(spec.spec, *tensors)


def emit(
    bound: Bound[PagedAttentionSpec], card: Card = DEFAULT, tuning: Tuning | None = None
) -> KernelSource:
    """Return the kernel module for a card. tuning: see launch_forms.choose."""
    spec = bound.spec
    q, k, v, *_ = (view.index for view in spec.inputs)
    scales = (spec.k_scales.index, spec.v_scales.index) if spec.k_scales and spec.v_scales else ()
    every = entries(spec, (q,) * 8, (k, v, *scales), card)
    name, most = signature(spec), split_tokens(spec)
    bounds = zip((most, None), every)
    found = {m: choose({n: [e] for n, e in x.items()}, name, m, tuning) for m, x in bounds}
    return kernel(
        "paged_attention", bound, SUMMARY, bound.operands, constants(spec, card),
        [*(["e4m3"] if floats_in_codes(spec) else []), slopes(spec), "plain_queries",
         "paged_attention"],
        [(most, forms.chosen) for most, forms in found.items()], spec.inputs[0].operand.shape[0],
        lines=spec.lines, workspace=workspaces(spec), counters=counters(spec), others=found,
        signature=name,
    )  # fmt: skip


def signature(spec: PagedAttentionSpec) -> str:
    """Return what a measurement of the kernels is kept under (kernel_ledger.py)."""
    shape = shape_of(spec)
    sizes = f"{shape['HEADS']}/{shape['KV_HEADS']} heads of {shape['D']} and {shape['DV']}"
    pages = f"pages of {shape['PAGE']} {spec.inputs[1].operand.dtype}"
    masks = "".join(f", {n} {v}" for n, v in (("window", spec.window), ("chunk", spec.chunk)) if v)
    return f"attention {sizes}, {pages}, {shape['SEGMENTS']} x {shape['SEGMENT']} keys{masks}"


def entries(
    spec: PagedAttentionSpec,
    rows: Sequence[int],
    caches: Sequence[int],
    card: Card,
    writes: bool = False,
) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Return the launches for few tokens and for many: by name, the standard one first. All forms
    give the same bits: how many programs share the units, and how far loads are ahead.

    rows: operands q, q's norm weight, k, k's, v, cos, sin, slots. caches: of keys, of values, and
    their scales if they hold codes. writes: the first one writes the
    step's keys and values. Warps and stages are those that compile without spills: registers hold
    the factors where the tensor cores do not read shared memory.
    """
    shape = shape_of(spec)
    sizes = tuple(python_dim(spec.inputs[i].operand.shape[0]) for i in (0, 4))
    states = [*caches, *([caches[0]] * (4 - len(caches)))]
    arguments = [*states, *(view.index for view in spec.inputs[3:])]
    arguments += [spec.sinks.index if spec.sinks else 0, spec.num_operands - 1]
    spaces = tuple(range(spec.num_operands, spec.num_operands + 3))
    narrow = next_power_of_two(shape["GROUP"], 16)
    wide, kv_heads = max(WHOLE_ROWS, narrow), shape["KV_HEADS"]
    blocks = f"{sizes[0]} // {wide // shape['GROUP']} + {sizes[1]} + 1"
    stages = (3 if card.async_dots else 2, 3 if card.warp == 32 else 2)
    stages = (1, 1) if spec.k_scales is not None else stages  # Triton 3.7 stages no bytes
    where = ("tl.program_id(0)", "tl.program_id(1)", "tl.num_programs(0)")
    ahead = (0,) if spec.k_scales is not None else (0, -1, 1)
    split = {}
    for share, more in itertools.product((1.0, 0.5, 2.0), ahead):
        count = max(1, -(-int(PROGRAMS * share) // kv_heads))
        split[f"{count} programs a head, {stages[0] + more} stages"] = Entry(
            "attend_split", (*rows, *arguments, *spaces, *sizes, *where),
            f"min({sizes[0]} * {shape['SEGMENTS']}, {count}), {kv_heads}",
            (("BLOCK_M", narrow), ("WRITES", int(writes))), num_stages=stages[0] + more,
        )  # fmt: skip
    queries = (rows[0], rows[1], rows[5], rows[6])
    whole = {
        f"{stages[1] + more} stages": Entry(
            "attend_whole", (*queries, *arguments, *sizes), f"{blocks}, {kv_heads}",
            (("BLOCK_M", wide),), num_warps=8 if card.warp == 32 else 4,
            num_stages=stages[1] + more,
        )
        for more in ahead
    }  # fmt: skip
    return split, whole


SUMMARY = ("paged attention: split over keys for few tokens, else one program a block of queries",)


def slopes(spec: PagedAttentionSpec) -> Text:
    """Return the function of a head's ALiBi slope; zero where there is none."""
    lines = ["@triton.jit", "def slope_of(head):", "    slope = head.to(tl.float32) * 0.0"]
    for head, slope in enumerate(spec.alibi or ()):
        lines.append(f"    slope = tl.where(head == {head}, {slope!r}, slope)")
    return Text("\n".join([*lines, "    return slope"]))


def counters(spec: PagedAttentionSpec) -> int:
    """Return how many blocks of queries may have segments."""
    return split_tokens(spec) * shape_of(spec)["KV_HEADS"]


def split_tokens(spec: PagedAttentionSpec) -> int:
    """Return the most tokens of a step whose keys are split: as many as the partial results fit."""
    shape = shape_of(spec)
    token = 4 * shape["HEADS"] * shape["SEGMENTS"] * (shape["DV"] + 2)
    tokens = MAX_SPLIT_TOKENS
    while tokens > 1 and tokens * token > MAX_PARTIAL_BYTES:
        tokens //= 2
    return tokens


def workspaces(spec: PagedAttentionSpec) -> tuple[Operand, ...]:
    """Return the segments' results, and their maxima and sums."""
    shape = shape_of(spec)
    rows = split_tokens(spec) * shape["HEADS"] * shape["SEGMENTS"]
    sizes = {"partial": rows * shape["DV"], "stats": 2 * rows}
    return tuple(Operand(name, "f32", (size,), (1,)) for name, size in sizes.items())


def shape_of(spec: PagedAttentionSpec) -> dict[str, int]:
    """Return the sizes that the module is made for, by the names of its constants."""
    q, k, v, _, _, tables = (i.operand for i in spec.inputs)
    heads, kv_heads, page = fixed(q.shape[1]), fixed(k.shape[1]), fixed(v.shape[2])
    context = fixed(tables.shape[1]) * page
    segment = next_power_of_two(-(-context // MAX_SEGMENTS), SEGMENT)
    return {
        "HEADS": heads, "KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "PAGE": page,
        "D": fixed(q.shape[2]), "DV": fixed(v.shape[3]), "SEGMENT": segment,
        "SEGMENTS": -(-context // segment),
    }  # fmt: skip


def floats_in_codes(spec: PagedAttentionSpec) -> bool:
    """Return whether the caches hold codes that are e4m3 numbers."""
    return spec.inputs[1].operand.dtype == "e4m3"


def constants(spec: PagedAttentionSpec, card: Card) -> Values:
    """Return the template's constants."""
    q, k, v, starts, lengths, tables = spec.inputs
    shape = shape_of(spec)
    narrow = shape["D"] <= 128 and k.operand.dtype != "f32"
    kinds = {"f32": "tl.float32", "bf16": "tl.bfloat16", "f16": "tl.float16"}
    kinds |= dict.fromkeys(LARGEST_CODE, "tl.bfloat16")  # which holds every code
    steps = [v.operand.strides[:2] if v else (0, 0) for v in (spec.k_scales, spec.v_scales)]
    return {
        **shape,
        "BLOCK_D": next_power_of_two(shape["D"], 16),
        "BLOCK_DV": next_power_of_two(shape["DV"], 16),
        "BLOCK_N": min(shape["SEGMENT"], 64 if narrow else 32),
        "SCAN": 64,
        "KV": Text(kinds[k.operand.dtype]),
        "WINDOW": spec.window or 0,
        "CHUNK": spec.chunk or 0,
        "SOFTCAP": float(spec.softcap or 0.0),
        "SCALE": float(spec.scale),
        "LOG2E": math.log2(math.e),
        "HAS_SINKS": spec.sinks is not None,
        "HAS_ALIBI": spec.alibi is not None,
        "IN_CODES": spec.k_scales is not None,
        "FLOAT_CODES": floats_in_codes(spec),
        "NATIVE_E4M3": card.fp8,
        "KS_PAGE": fixed(steps[0][0]),
        "KS_HEAD": fixed(steps[0][1]),
        "VS_PAGE": fixed(steps[1][0]),
        "VS_HEAD": fixed(steps[1][1]),
        "SINKS_OFFSET": fixed(spec.sinks.offset) if spec.sinks else 0,
        "Q_OFFSET": fixed(q.offset),
        "Q_TOKEN": fixed(q.operand.strides[0]),
        "Q_HEAD": fixed(q.operand.strides[1]),
        "OUT_TOKEN": fixed(spec.out.strides[0]),
        "OUT_HEAD": fixed(spec.out.strides[1]),
        "KC_PAGE": fixed(k.operand.strides[0]),
        "KC_HEAD": fixed(k.operand.strides[1]),
        "VC_PAGE": fixed(v.operand.strides[0]),
        "VC_HEAD": fixed(v.operand.strides[1]),
        "STARTS_OFFSET": fixed(starts.offset),
        "LENGTHS_OFFSET": fixed(lengths.offset),
        "TABLES_OFFSET": fixed(tables.offset),
        "TABLES_ROW": fixed(tables.operand.strides[0]),
    }
