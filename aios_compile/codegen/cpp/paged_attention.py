"""out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h / G]) v[j, h / G] over the visible keys j.

Layouts: q[T, H, D] float32 (any token and head stride), k_cache[N, Hkv, D, page] and
v_cache[N, Hkv, page, Dv] in float32, bf16, f16, or int8 or e4m3, then with k_scales, v_scales
f32[N, Hkv, page], which multiply scores and probabilities (the codes become floats as they are);
query_starts i64[S+1], context_lengths i64[S], page_tables i64[S, P], sinks f32[H] (optional),
out[T, H, Dv] float32. Sums in float32.
With `rounded` the products run on the processor's dot products: over bf16, q and the probabilities
are rounded to bf16 (vdpbf16ps: twice the FMA peak, half the instructions a byte); over int8 codes
they become whole numbers of 16 bits under a scale, multiplied as two bytes (vpdpbusd), exactly.
Visible: causal; window w: the last w keys; chunk c: keys of the query's chunk of c positions.
Alibi: slope * (j - position of t) is added to the capped scores (Press et al., 2021).
Bytes: K and V of a sequence once for each (key/value head, tile of up to 32 rows = tokens * group).
Items: (key/value head, token), tokens fastest; neighbouring tokens of one sequence form the tiles.
In a step of at most SPLIT_TOKENS tokens the spans of about 512 keys are shared out too, with all
heads of a page side by side; what the parts give is merged behind a barrier.
Algorithm: online softmax (Milakov and Gimelshein, 2018; FlashAttention-2) in steps of four pages,
merged a span at a time (flash-decoding). Steps, spans and merging have fixed places and one order,
so that bits do not depend on batch, chunking, tiles or threads.
Measured with benchmarks/attention.py (2 cores of Zen 4, shared, bf16, 8,192 tokens of context): one
token reads at 69-76 % of the read bandwidth with pages in random order, 71-88 % in ascending order
(53 % when only heads are shared out); 64 tokens compute at 70-76 % of the FMA peak, 88 % when all
lies in a cache. Rounded, 64 tokens are 1.74 times as fast over bf16 and 1.54 over int8; one token
1.13-1.18 times over int8 and 0.93-0.98 over bf16 (memory), 1.7 and 1.35 times out of a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.codegen.cpp.head_rows import FLOATS, LARGEST_CODE
from aios_compile.codegen.cpp.template import (
    C_TYPES,
    constants,
    kernel,
    number,
    pointer,
    template_text,
)
from aios_compile.codegen.operand import Dim, Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import Strided, body_lines, resolve
from aios_compile.ir.attention_reference import can_round

STEP_PAGES = 4  # scores that are made at once; a partial result is a whole number of steps
SPAN_TOKENS = 512  # of a partial result, about: merging costs little beside so many
SPLIT_TOKENS = 16  # of a step whose spans are shared out; more tokens share out themselves
ARGUMENTS = ("q", "k_cache", "v_cache", "query_starts", "context_lengths", "page_tables")
OPTIONAL = ("sinks", "k_scales", "v_scales")  # tensors that may be missing


@dataclass(frozen=True)
class Products:
    """How queries and probabilities are multiplied: templates/attention_<name>.h.

    query, share: C types. per_value: elements of a query a value, as a fraction. per_probability:
    elements of a share. headers: what the template includes.
    """

    name: str
    query: str
    share: str
    per_value: tuple[int, int]
    per_probability: int
    headers: tuple[str, ...] = ()


IN_FLOATS = Products("floats", "float", "float", (1, 1), 0)
IN_PAIRS = Products("pairs", "pair", "bf16", (1, 2), 1, ("products.h",))
IN_CODES = Products("codes", "int8_t", "uint8_t", (2, 1), 2, ("quantized.h",))


@dataclass(frozen=True)
class PagedAttentionSpec:
    """Everything the text depends on. `inputs` are views of operands, in the op's order."""

    inputs: tuple[Strided, ...]
    sinks: Strided | None
    out: Operand
    scale: float
    window: int | None
    softcap: float | None
    chunk: int | None
    num_operands: int
    alibi: tuple[float, ...] | None = None
    k_scales: Strided | None = None
    v_scales: Strided | None = None
    rounded: bool = False
    lines: tuple[str, ...] = ()

    @property
    def products(self) -> Products:
        """What queries and probabilities become for the products."""
        if not self.rounded:
            return IN_FLOATS
        return IN_PAIRS if self.k_scales is None else IN_CODES


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> PagedAttentionSpec | None:
    """Return the spec of a body that is one aios.paged_attention, else None."""
    (result,) = body.graph.output_node().args
    node: Any = result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aios.paged_attention.default:
        return None
    return spec_at(node, operands, {}, operands[-1])


def spec_at(
    node: fx.Node, operands: Sequence[Operand], known: Mapping[str, Strided], out: Operand
) -> PagedAttentionSpec | None:
    """Return the spec of an aios.paged_attention; `known`: where arguments are that are computed
    in the body.
    """
    options = ("scale", "window", "softcap", "chunk", "sinks", "alibi", *OPTIONAL[1:], "rounded")
    names = (*ARGUMENTS, *options)
    bound: dict[str, Any] = dict(zip(names, node.args)) | dict(node.kwargs)
    given = {
        name: known[name] if name in known else resolve(bound.get(name), operands)
        for name in (*ARGUMENTS, *OPTIONAL)
    }
    if any(bound.get(name) is not None and view is None for name, view in given.items()):
        return None
    owner = node.graph.owning_module
    assert isinstance(owner, fx.GraphModule)
    spec = PagedAttentionSpec(
        tuple(view for name in ARGUMENTS if (view := given[name]) is not None),
        given["sinks"],
        out,
        float(bound["scale"]),
        bound.get("window"),
        bound.get("softcap"),
        bound.get("chunk"),
        len(operands),
        None if bound.get("alibi") is None else tuple(map(float, bound["alibi"])),
        given["k_scales"],
        given["v_scales"],
        bool(bound.get("rounded", False)),
        body_lines(owner),
    )
    return spec if _fits(spec) else None


def _fits(spec: PagedAttentionSpec) -> bool:
    q, k, v = (i.operand for i in spec.inputs[:3])
    page, head = v.shape[2], v.shape[3]
    scales = [s.operand for s in (spec.k_scales, spec.v_scales) if s is not None]
    return (
        q.dtype == "f32"
        and spec.out.dtype == "f32"
        and k.dtype == v.dtype
        and k.dtype in (LARGEST_CODE if len(scales) == 2 else FLOATS)
        and all(s.dtype == "f32" and s.strides[2] == 1 for s in scales)
        and isinstance(page, int)
        and page % 16 == 0
        and q.strides[2] == 1
        and k.strides[2:] == (page, 1)
        and v.strides[2:] == (head, 1)
        and spec.out.strides[2] == 1
        and (not spec.rounded or _can_round(k.dtype, k.shape[2], head))
    )


def _can_round(dtype: str, width: Dim, v_width: Dim) -> bool:
    assert isinstance(width, int) and isinstance(v_width, int)
    return dtype in ("bf16", "i8") and can_round(dtype == "i8", width, v_width)


def reference(spec: PagedAttentionSpec, *tensors: Tensor) -> Tensor:
    """Compute the kernel's output in eager PyTorch; tensors in the op's order."""
    op = torch.ops.aios.paged_attention.default
    rest = list(tensors[6:])
    sinks = rest.pop(0) if spec.sinks is not None else None
    options = (spec.scale, spec.window, spec.softcap, spec.chunk, sinks, spec.alibi)
    result: Tensor = op(*tensors[:6], *options, *rest, rounded=spec.rounded)
    return result


def emit(spec: PagedAttentionSpec) -> KernelSource:
    """Return the kernel's text."""
    q, k, v, starts, lengths, tables = spec.inputs
    heads, width = q.operand.shape[1:]
    kv_heads = k.operand.shape[1]
    assert isinstance(heads, int) and isinstance(width, int) and isinstance(kv_heads, int)
    page, v_width = v.operand.shape[2:]
    assert isinstance(page, int) and isinstance(v_width, int)
    parts = workspace(spec)
    definitions = [
        f"using KeyValue = {C_TYPES[k.operand.dtype]};",
        constants(HEADS=heads, KV_HEADS=kv_heads, D=width, DV=v_width, PAGE=page),
        constants(WINDOW=spec.window or 0, CHUNK=spec.chunk or 0, HAS_SINKS=spec.sinks is not None),
        constants(SCALE=float(spec.scale), SOFTCAP=float(spec.softcap or 0.0)),
        _slopes(spec.alibi, heads),
        constants(AHEAD=STEP_PAGES, SPAN=span_pages(spec), MAX_SPANS=max_spans(spec)),
        constants(SPLIT_TOKENS=SPLIT_TOKENS),
        number("num_tokens", q.operand.shape[0]),
        number("num_sequences", lengths.operand.shape[0]),
        pointer("q_at", q.index, q.operand, ("t", "h"), q.offset),
        pointer("k_at", k.index, k.operand, ("page", "head"), k.offset),
        pointer("v_at", v.index, v.operand, ("page", "head"), v.offset),
        pointer("out_at", spec.num_operands - 1, spec.out, ("t", "h")),
        pointer("part_at", spec.num_operands, parts, ("t", "h", "span")),
        pointer("pages_of", tables.index, tables.operand, ("s",), tables.offset),
        pointer("start_of", starts.index, starts.operand, ("s",), starts.offset),
        pointer("length_of", lengths.index, lengths.operand, ("s",), lengths.offset),
    ]
    definitions += [
        _optional("sink_at", spec.sinks, ("h",)),
        constants(IN_CODES=spec.k_scales is not None),
        _optional("key_scales_at", spec.k_scales, ("page", "head")),
        _optional("value_scales_at", spec.v_scales, ("page", "head")),
    ]
    products = spec.products
    definitions += [
        f"using Query = {products.query};\nusing Share = {products.share};",
        constants(
            QUERIES=width * products.per_value[0] // products.per_value[1],
            SHARES=STEP_PAGES * page * products.per_probability or 1,
        ),
        *(template_text(f"attention_{x}") for x in ("values", "tile", products.name, "steps")),
    ]
    splits = max_spans(spec) > 1
    count = spec.num_operands
    headers = products.headers + (("e4m3.h",) if k.operand.dtype == "e4m3" else ())
    source = kernel(
        "paged_attention", spec, definitions, count, lines=spec.lines, finishes=splits,
        headers=headers,
    )  # fmt: skip
    return dataclasses.replace(source, workspace=(parts,)) if splits else source


def _optional(function: str, view: Strided | None, indices: Sequence[str]) -> str:
    """Return the address function of a tensor that may be missing: a null pointer then."""
    if view is not None:
        return pointer(function, view.index, view.operand, indices, view.offset)
    arguments = ", int64_t" * len(indices)
    return (
        f"AIOS_INLINE float* {function}(const Sizes*, void* const*{arguments}) "
        "{ return nullptr; }"
    )


def span_pages(spec: PagedAttentionSpec) -> int:
    """Return the pages of a span: about SPAN_TOKENS tokens, and whole steps."""
    page = spec.inputs[2].operand.shape[2]
    assert isinstance(page, int)
    return max(STEP_PAGES, SPAN_TOKENS // page // STEP_PAGES * STEP_PAGES)


def max_spans(spec: PagedAttentionSpec) -> int:
    """Return how many spans the longest sequence has; 1 when the table's width is not known."""
    width = spec.inputs[5].operand.shape[1]
    return -(-width // span_pages(spec)) if isinstance(width, int) else 1


def workspace(spec: PagedAttentionSpec) -> Operand:
    """Return the buffer of partial results: a row of Dv + 2 floats a (token, head, span)."""
    heads, v_width = spec.out.shape[1:]
    assert isinstance(heads, int) and isinstance(v_width, int)
    spans, row = max_spans(spec), v_width + 2
    strides = (heads * spans * row, spans * row, row, 1)
    return Operand("parts", "f32", (SPLIT_TOKENS, heads, spans, row), strides)


def _slopes(alibi: tuple[float, ...] | None, heads: int) -> str:
    """Return the slopes of the query heads as C text; zeros where no bias is added."""
    values = ", ".join(f"{x.hex()}f" for x in alibi or (0.0,) * heads)
    flag = str(alibi is not None).lower()
    return f"constexpr bool HAS_ALIBI = {flag};\nconstexpr float SLOPES[HEADS] = {{{values}}};"
