"""y[t, n] = f(sum_k x[t, k] * w[n, k], ...): a linear layer with any pointwise tail.

Layouts: x[T, K] float32 (any row stride), w packed as rows16 ([ceil(N / 16)][K][16], float32, bf16
or f16) or, for aios.bf16_linear, as pairs16 (codegen/packing.py); the tail's operands (bias,
residual, ...) and outputs [T, N] as they are. A gated tail reads the halves of w[2F, K] (gate rows,
then up rows) and writes [T, F]: both halves' blocks lie by turns and are computed together.
Sums are float32. rows16: one chain of fused multiply-adds over k ascending an element. pairs16: x
is rounded to bf16, to nearest even, and the chain takes k + 1, then k, of each pair, one rounding
each; vdpbf16ps does so and takes denormal bf16 and denormal sums as zeros (processors without it
keep them). Either way the same bits for every T, tile and split.
Bytes: w once for up to 12 tokens (6 on AVX2), and once for each chunk of tokens whose prepared copy
fits in L2 beyond that. Measured (benchmarks/kernels.py, Zen 4, one core): pairs read at the whole
bandwidth at one token and reach 88-94 % of the peak of vdpbf16ps, which is twice that of FMAs, at
256; rows16 80-86 % of the bandwidth and 80-87 % of the FMA peak.
Items: 32 columns for one token; else parts of tokens to prepare in the workspace, then
(chunk, 32 columns). Prepared tokens lie row by row: token fastest was 1 to 3 % slower at every
number of tokens (K = 1,024 and 3,072, one core of Zen 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from aios_compile.codegen.access import Access, outputs
from aios_compile.codegen.cpp.candidates import candidates_of
from aios_compile.codegen.cpp.dialect import Cpp
from aios_compile.codegen.cpp.frame import indent, pointer
from aios_compile.codegen.cpp.head_rows import without_leading_ones
from aios_compile.codegen.cpp.nest import Nest
from aios_compile.codegen.cpp.template import C_TYPES, constants, kernel, number
from aios_compile.codegen.cpp.template import pointer as address_function
from aios_compile.codegen.emit_kernels import LAYOUTS, layout_in
from aios_compile.codegen.expression import Const, Expr, Printer, formula
from aios_compile.codegen.linear_index import Linear, add_dims
from aios_compile.codegen.linear_tail import inplace_pairs, read_tail
from aios_compile.codegen.operand import BYTES, Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import Strided, body_lines, resolve

BLOCK = 16
LINE_WORDS = 16  # of a cache line, 32 bits each
SLACK_TOKENS = 12  # the last tile may be wider than its tokens


@dataclass(frozen=True)
class LinearSpec:
    """Everything the text depends on.

    operands: inputs, outputs, then one pseudo operand a stream: the sums of a row. leaves: what the
    values read. values, stores: each output's expression and address over (token, column). pairs:
    x is rounded to bf16, and the weight is packed in pairs.
    """

    x: Strided
    weight: int
    streams: int
    operands: tuple[Operand, ...]
    num_outputs: int
    leaves: tuple[Access, ...]
    values: tuple[Expr, ...]
    stores: tuple[Linear, ...]
    lines: tuple[str, ...] = ()
    pairs: bool = False

    @property
    def columns(self) -> int:
        rows = self.operands[self.weight].shape[0]
        assert isinstance(rows, int)
        return rows // self.streams

    @property
    def depth(self) -> int:
        depth = self.x.operand.shape[1]
        assert isinstance(depth, int)
        return depth

    def outputs(self) -> range:
        end = len(self.operands) - self.streams
        return range(end - self.num_outputs, end)


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> LinearSpec | None:
    """Return the spec of a body of one linear on floats and a pointwise tail, else None."""
    nodes = [n for n in body.graph.nodes if LAYOUTS.get(n.target)]
    if len(nodes) != 1 or not all(isinstance(r, fx.Node) for r in outputs(body)):
        return None
    x = without_leading_ones(resolve(nodes[0].args[0], operands), 2)
    weight = resolve(nodes[0].args[1], operands)
    layout = LAYOUTS[nodes[0].target]
    if x is None or weight is None:
        return None
    if weight.operand.packed != layout_in(body, nodes[0].args[1], layout):
        return None
    depth, rows = x.operand.shape[1], weight.operand.shape[0]
    dense = x.operand.strides[1] == 1 and x.operand.dtype == "f32"
    if not dense or not isinstance(depth, int) or not isinstance(rows, int):
        return None
    bias = nodes[0].args[2] if len(nodes[0].args) > 2 else nodes[0].kwargs.get("bias")
    spec = with_tail(body, operands, nodes[0], bias, x, weight.index)
    return spec and dataclasses.replace(spec, pairs=layout == "pairs16")


def with_tail(
    body: fx.GraphModule,
    operands: Sequence[Operand],
    node: fx.Node,
    bias: Any,
    x: Strided,
    weight: int,
) -> LinearSpec | None:
    """Return the spec of a body whose product `node` of operands x and weight has a pointwise tail.

    None when the tail is not pointwise, or splits the product other than into two halves.
    """
    rows = operands[weight].shape[0]
    assert isinstance(rows, int)
    tail = read_tail(body, operands, node, bias, x.operand.shape[0], rows)
    if tail is None or (tail.streams == 2 and rows % (2 * BLOCK)):
        return None
    columns = rows // tail.streams
    sums = [Operand(f"sum{s}", "f32", (1, columns), (0, 1)) for s in range(tail.streams)]
    spec = LinearSpec(
        x,
        weight,
        tail.streams,
        (*operands, *sums),
        len(tail.values),
        tail.leaves,
        tail.values,
        tail.stores,
        body_lines(body),
    )
    nest = Nest(spec.operands, spec.leaves, 2)
    stored = list(zip(spec.outputs(), spec.stores))
    return spec if nest.can_vectorize(spec.values, stored) else None


def reference(spec: LinearSpec, body: fx.GraphModule, *tensors: Tensor) -> Any:
    """Compute the outputs in eager PyTorch from unpacked weights: the body is the definition."""
    return body(*tensors)


def inplace(spec: LinearSpec) -> tuple[tuple[int, int], ...]:
    """Return (output, input) pairs that the tail touches at one address; never x or the weight."""
    fixed = (spec.x.index, spec.weight)
    return inplace_pairs(spec.operands, spec.outputs().start, spec.leaves, spec.stores, fixed)


def emit(spec: LinearSpec) -> KernelSource:
    """Return the kernel's text."""
    kind = "pair" if spec.pairs else C_TYPES[spec.operands[spec.weight].dtype]
    types = f"using Weight = {kind};\nusing Element = {'pair' if spec.pairs else 'float'};"
    stride = prepared_stride((spec.depth + 1) // 2 if spec.pairs else spec.depth)
    sizes = constants(PER=2 if spec.pairs else 1, STRIDE=stride)
    text = [types, sizes, *definitions(spec)]
    weight_type = spec.operands[spec.weight].dtype
    weight_bytes = spec.columns * spec.streams * spec.depth * BYTES[weight_type]
    source = kernel(
        "linear",
        spec,
        text,
        spec.outputs().stop,
        inplace=inplace(spec),
        lines=spec.lines,
        headers=("tiles.h", "products.h"),
        finishes=True,
        candidates=candidates_of(weight_bytes),
    )
    return dataclasses.replace(source, workspace=(workspace(spec, stride),))


def prepared_stride(words: int) -> int:
    """Return the words from a prepared token to the next: a cache line more than it has.

    The rows of a tile then begin in different sets of the first cache whatever the depth is.
    """
    return (-(-words // LINE_WORDS) + 1) * LINE_WORDS


def workspace(spec: LinearSpec, words: int) -> Operand:
    """Return the buffer of prepared tokens, `words` of 32 bits each."""
    tokens = add_dims(spec.x.operand.shape[0], SLACK_TOKENS)
    return Operand("prepared", "f32", (tokens, words), (words, 1))


def definitions(spec: LinearSpec) -> list[str]:
    """Return the definitions that the templates of products share: sizes, addresses, epilogue."""
    weight = spec.operands[spec.weight]
    base = Operand(weight.name, weight.dtype, (), ())
    names = [spec.operands[leaf.operand].name for leaf in spec.leaves]
    return [
        *(f"// out{i} = {formula(v, names)}" for i, v in enumerate(spec.values)),
        constants(K=spec.depth, COLUMNS=spec.columns, STREAMS=spec.streams),
        number("num_tokens", spec.x.operand.shape[0]),
        address_function("x_row", spec.x.index, spec.x.operand, ("t",), spec.x.offset),
        address_function("weight", spec.weight, base, ()),
        f"AIOS_INLINE void* workspace(void* const* p) {{ return p[{spec.outputs().stop}]; }}",
        epilogue(spec),
    ]


def epilogue(spec: LinearSpec) -> str:
    """Return the C function that turns the sums of token i0, columns [begin, end), into outputs."""
    nest = Nest(spec.operands, spec.leaves, 2)
    used = {leaf.operand for leaf in spec.leaves} | set(spec.outputs())
    first_sum = spec.outputs().stop
    lines = [
        pointer(spec.operands[i], i, i in spec.outputs()) for i in sorted(used) if i < first_sum
    ]
    for s in range(spec.streams):
        lines.append(f"const float* sum{s}_{first_sum + s} = stream{s} - begin;")
    before, loads, values = nest.vector_parts(spec.values)
    body, results = Printer(Cpp(True, ("i0", "i1"))).statements(values, loads)
    for k, value in enumerate(values):
        text = f"splat({results[k]})" if isinstance(value, Const) else results[k]
        body.append(nest.declare(value.dtype, f"r{k}", text, True))
    for k, (index, store) in enumerate(zip(spec.outputs(), spec.stores)):
        body.append(nest.store(index, store, f"r{k}", True))
    loop = ["for_lanes(begin, end, [&](int64_t i1, auto count) {", *indent(body), "});"]
    signature = (
        "AIOS_INLINE void epilogue(const Sizes* n, void* const* p, int64_t i0, int64_t begin,\n"
        "                          int64_t end, const float* stream0, const float* stream1) {"
    )
    return "\n".join([signature, *indent([*lines, *before, *loop]), "}"])
