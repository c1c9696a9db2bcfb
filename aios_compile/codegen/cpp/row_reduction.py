"""Reductions over one dimension with everything around them: norms, softmax, means, argmax.

out[row, i] = f(inputs at (row, i), reductions of the row). Layout: any strides; the reduced
dimension is innermost in the loop nest wherever it is in memory. Bytes moved: each operand once,
again from the cache for every further pass (a softmax reads its row three times). Items: one row
each. Order of a sum: lane k adds elements k, k + VL, ..., then the lanes are added as a tree; it
depends on the width of a register and on nothing else. Passes: one loop for all reductions of known
inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from aios_compile.codegen import reductions
from aios_compile.codegen.access import (
    Access,
    Leaf,
    NotExpressible,
    Reader,
    Reduction,
    address_of,
    model_lines,
    noun,
    outputs,
    shape_of,
)
from aios_compile.codegen.cpp.dialect import Cpp, scalar_type
from aios_compile.codegen.cpp.frame import dim_c, frame, indent, pointer
from aios_compile.codegen.cpp.nest import Nest
from aios_compile.codegen.expression import Const, Expr, Load, Printer, formula, walk
from aios_compile.codegen.linear_index import Linear, product
from aios_compile.codegen.movement import reshaped
from aios_compile.codegen.naming import layout, symbol_of
from aios_compile.codegen.operand import Dim, Operand
from aios_compile.codegen.reference import Grid, infer_sizes, new_outputs
from aios_compile.codegen.source import KernelSource

START = {"sum": "0", "prod": "1", "max": "-kInfinity", "min": "kInfinity"}
STEP = {"sum": "{a} + {x}", "prod": "{a} * {x}", "max": "max({a}, {x})", "min": "min({a}, {x})"}
ACROSS = {"sum": "reduce_add", "prod": "reduce_mul", "max": "reduce_max", "min": "reduce_min"}
LANES = ("sum", "prod")  # where the order of the elements makes a difference
LEAST = {"i64": "INT64_MIN", "i32": "INT32_MIN", "bool": "false", "f64": "-(double)kInfinity"}
MOST = {"i64": "INT64_MAX", "i32": "INT32_MAX", "bool": "true", "f64": "(double)kInfinity"}


@dataclass(frozen=True)
class Output:
    """One result: `full` ones have a value for every inner index, the others one a row."""

    value: Expr
    store: Linear
    full: bool


@dataclass(frozen=True)
class RowReductionSpec:
    """All that the text depends on. Operands: inputs, then outputs. shape: rows, then the inner."""

    name: str
    operands: tuple[Operand, ...]
    shape: tuple[Dim, ...]
    leaves: tuple[Leaf, ...]
    results: tuple[Output, ...]
    model_lines: tuple[str, ...] = ()

    def first_output(self) -> int:
        return len(self.operands) - len(self.results)


def spec_of(
    body: fx.GraphModule, operands: Sequence[Operand], name: str | None = None
) -> RowReductionSpec | None:
    """Return the spec of a kernel body, or None when it reduces nothing or in several spaces."""
    space = reductions.space_of(body)
    if space is None:
        return None
    reader = Reader(body, operands, space.ranges(), functools.partial(reductions.reduce, space))
    rows = space.row_coordinates()
    at = space.coordinates(rows, reader.limits())
    results = []
    try:
        for node, operand in zip(outputs(body), operands[-len(outputs(body)) :]):
            shape = shape_of(node)
            full = product(shape) == product(space.shape)
            if not full and product(shape) != product(space.rows):
                return None
            sizes, place = (space.source, at) if full else (space.rows, rows)
            place = reshaped(sizes, place, shape, reader.limits())
            store = address_of(operand, place)
            results.append(Output(reader.at(node, place), store, full))
    except NotExpressible:
        return None
    return RowReductionSpec(
        name or noun(body, "row_reduction"),
        tuple(operands),
        space.shape,
        tuple(reader.leaves),
        tuple(results),
        model_lines(body),
    )


def reference(spec: RowReductionSpec, *tensors: Tensor) -> list[Tensor]:
    """Compute the outputs in torch from the spec alone."""
    sizes = infer_sizes(spec.operands, tensors)
    outs = new_outputs(spec.operands[spec.first_output() :], sizes)
    ranges = [(0, s if isinstance(s, int) else None) for s in spec.shape]
    grid = Grid(spec.shape, ranges, sizes, spec.leaves, tensors)
    for out, result in zip(outs, spec.results):
        grid.put(out, result.store, grid.value(result.value))
    return outs


def emit(spec: RowReductionSpec) -> KernelSource:
    """Return the kernel."""
    symbol, first = symbol_of(spec.name, spec), spec.first_output()
    used = {leaf.operand for leaf in spec.leaves if isinstance(leaf, Access)}
    names = {
        i: f"{leaf.kind}{i}" for i, leaf in enumerate(spec.leaves) if isinstance(leaf, Reduction)
    }
    nest = Nest(spec.operands, spec.leaves, len(spec.shape), names)
    lines = [
        pointer(o, i, i >= first) for i, o in enumerate(spec.operands) if i in used or i >= first
    ]
    lines += ["for (int64_t item = begin; item < end; ++item) {"]
    lines += indent(_rows(spec.shape))
    for level in _levels(spec.leaves):
        lines += indent(_write_pass(spec, nest, level))
    lines += indent(_write_rows(spec, nest)) + indent(_write_full(spec, nest)) + ["}"]
    text = frame(symbol, _comment(spec, names), dim_c(product(spec.shape[:-1])), lines)
    return KernelSource(
        spec.name, symbol, "cpp", text, len(spec.operands), inplace(spec), spec.model_lines
    )


def _rows(shape: Sequence[Dim]) -> list[str]:
    lines = []
    for dim in range(len(shape) - 1):
        below = product(shape[dim + 1 : -1])
        place = "item" if below == 1 else f"item / {dim_c(below)}"
        above = "" if dim == 0 else f" % {dim_c(shape[dim])}"
        lines.append(f"const int64_t i{dim} = {place}{above};")
    return lines


def _levels(leaves: Sequence[Leaf]) -> list[list[int]]:
    """Group the reductions by how many reductions come before them."""
    depth: dict[int, int] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Reduction):
            inside = [e.index for e in walk(leaf.value) if isinstance(e, Load)]
            depth[index] = 1 + max((depth[i] for i in inside if i in depth), default=0)
    return [[i for i, d in depth.items() if d == level] for level in sorted(set(depth.values()))]


def _reduction(spec: RowReductionSpec, index: int) -> Reduction:
    leaf = spec.leaves[index]
    assert isinstance(leaf, Reduction)
    return leaf


def _write_pass(spec: RowReductionSpec, nest: Nest, level: Sequence[int]) -> list[str]:
    """Return the loop that computes the reductions of one level."""
    found = {index: _reduction(spec, index) for index in level}
    values = [r.value for r in found.values()]
    floats = all(r.kind in STEP and r.value.dtype == "f32" for r in found.values())
    if floats and nest.can_vectorize(values, []):
        return _vector_pass(spec, nest, found)
    lines, after, ends = [], [], []
    i = f"i{nest.inner}"
    for index, r in found.items():
        kind = scalar_type(r.value.dtype)
        name = nest.names[index]
        if r.kind in LANES and kind == "float":  # as many partial sums as a vector would have
            lines.append(f"vf acc{index} = splat({_start(r)});")
            after.append((f"acc{index}[{i} % VL]", r))
            ends.append(f"const float {name} = {ACROSS[r.kind]}(acc{index});")
        elif r.kind in STEP:
            lines.append(f"{kind} {name} = {_start(r)};")
            after.append((name, r))
        else:
            lines += [f"int64_t {name} = 0;", f"{kind} best{index} = {_start(r)};"]
            after.append((f"best{index}", r))
    body, results = nest.scalar().statements(values, nest.scalar_loads(values))
    for (name, r), text, index in zip(after, results, found):
        if r.kind in STEP:
            body.append(f"{name} = {STEP[r.kind].format(a=name, x=text)};")
            continue
        sign = ">" if r.kind == "argmax" else "<"
        body.append(f"const {scalar_type(r.value.dtype)} x{index} = {text};")
        better = f"x{index} {sign} {name} || (x{index} != x{index} && {name} == {name})"
        body.append(
            f"if ({better} || {i} == 0) {{ {name} = x{index}; {nest.names[index]} = {i}; }}"
        )
    loop = f"for (int64_t {i} = 0; {i} < {dim_c(spec.shape[-1])}; ++{i}) {{"
    return [*lines, loop, *indent(body), "}", *ends]


def _start(r: Reduction) -> str:
    kind = r.kind.removeprefix("arg")
    if kind in ("max", "min") and r.value.dtype != "f32":
        table = LEAST if kind == "max" else MOST
        return table.get(r.value.dtype, table["i32"])
    return f"({scalar_type(r.value.dtype)}){START[kind]}"


def _vector_pass(spec: RowReductionSpec, nest: Nest, found: dict[int, Reduction]) -> list[str]:
    lines = [f"float {nest.names[index]};" for index in found]
    inside, loads, values = nest.vector_parts([r.value for r in found.values()])
    inside += [f"vf acc{index} = splat((float){START[r.kind]});" for index, r in found.items()]
    printer = Printer(Cpp(True, tuple(f"i{d}" for d in range(nest.rank))))
    body, results = printer.statements(values, loads)
    for (index, r), value, text in zip(found.items(), values, results):
        text = f"splat({text})" if isinstance(value, Const) else text
        kept = f"keep({text}, count, {START[r.kind]})"
        body.append(f"acc{index} = {STEP[r.kind].format(a=f'acc{index}', x=kept)};")
    i = f"i{nest.inner}"
    inside.append(f"for_lanes(0, {dim_c(spec.shape[-1])}, [&](int64_t {i}, auto count) {{")
    inside += [*indent(body), "});"]
    inside += [f"{nest.names[i]} = {ACROSS[r.kind]}(acc{i});" for i, r in found.items()]
    return [*lines, "{", *indent(inside), "}"]


def _write_rows(spec: RowReductionSpec, nest: Nest) -> list[str]:
    """Return the stores of the results that are one value a row."""
    found = [(k, r) for k, r in enumerate(spec.results) if not r.full]
    values = [r.value for _, r in found]
    lines, texts = nest.scalar().statements(values, nest.scalar_loads(values), "w")
    first = spec.first_output()
    return lines + [nest.store(first + k, r.store, t, False) for (k, r), t in zip(found, texts)]


def _write_full(spec: RowReductionSpec, nest: Nest) -> list[str]:
    """Return the loop that writes the results with a value for every inner index."""
    found = [(spec.first_output() + k, r) for k, r in enumerate(spec.results) if r.full]
    if not found:
        return []
    values: list[Expr] = [r.value for _, r in found]
    stores = [(operand, r.store) for operand, r in found]
    vector = nest.can_vectorize(values, stores)
    before: list[str] = []
    i, size = f"i{nest.inner}", dim_c(spec.shape[-1])
    if vector:
        before, loads, values = nest.vector_parts(values)
        printer = Printer(Cpp(True, tuple(f"i{d}" for d in range(nest.rank))))
        head, tail = f"for_lanes(0, {size}, [&](int64_t {i}, auto count) {{", "});"
    else:
        loads, printer = nest.scalar_loads(values), nest.scalar()
        head, tail = f"for (int64_t {i} = 0; {i} < {size}; ++{i}) {{", "}"
    body, texts = printer.statements(values, loads)
    for k, (value, text) in enumerate(zip(values, texts)):
        text = f"splat({text})" if vector and isinstance(value, Const) else text
        body.append(nest.declare(value.dtype, f"r{k}", text, vector))
    body += [nest.store(o, a, f"r{k}", vector) for k, (o, a) in enumerate(stores)]
    return ["{", *indent([*before, head, *indent(body), tail]), "}"]


def _comment(spec: RowReductionSpec, names: dict[int, str]) -> list[str]:
    texts = [
        spec.operands[leaf.operand].name if isinstance(leaf, Access) else names[i]
        for i, leaf in enumerate(spec.leaves)
    ]
    lines = [f"{spec.name}: reductions over the last of ({', '.join(map(_text, spec.shape))})"]
    for i, leaf in enumerate(spec.leaves):
        if isinstance(leaf, Reduction):
            lines.append(f"{names[i]} = {leaf.kind}({formula(leaf.value, texts)})")
    for operand, result in zip(spec.operands[spec.first_output() :], spec.results):
        lines.append(f"{operand.name} = {formula(result.value, texts)}")
    lines += [f"  {layout(operand)}" for operand in spec.operands]
    return [*lines, "bytes: each operand once", *(f"model: {line}" for line in spec.model_lines)]


def _text(dim: Dim) -> str:
    return str(dim) if isinstance(dim, int) else dim.text("")


def inplace(spec: RowReductionSpec) -> tuple[tuple[int, int], ...]:
    """Return the (output, input) pairs that may share memory.

    Safe when the input is only read at the address that the same inner index writes last: a row is
    read whole before its output loop, and no row reads another.
    """
    pairs = []
    for number, result in enumerate(spec.results):
        for operand in range(spec.first_output()):
            out = spec.operands[spec.first_output() + number]
            reads = [
                leaf.address == result.store
                for leaf in spec.leaves
                if isinstance(leaf, Access) and leaf.operand == operand
            ]
            if result.full and reads and all(reads) and out.dtype == spec.operands[operand].dtype:
                pairs.append((number, operand))
    return tuple(pairs)
