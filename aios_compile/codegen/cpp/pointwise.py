"""out[i] = f(inputs at i): any group of pointwise operations and copies over one iteration space.

Layout: every operand has its own strides (0 where it broadcasts); views, slices, cat, pad and
gathers inside the group are index arithmetic. Bytes moved: each operand once. Items: the rows of
the output (all dimensions but the last), in pieces of 4096 elements where a row is long. The last
dimension runs in vectors where all its types are 32 bits or less in registers; a part that does not
change along it is computed once a row. A border inside the iteration space (between two parts of a
cat) splits it into variants, so that each has straight loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from aios_compile.codegen.access import (
    Access,
    Coordinates,
    NotExpressible,
    Reader,
    address_of,
    model_lines,
    noun,
    outputs,
    shape_of,
)
from aios_compile.codegen.cpp.dialect import Cpp
from aios_compile.codegen.cpp.frame import dim_c, frame, indent, pointer
from aios_compile.codegen.cpp.nest import Nest
from aios_compile.codegen.expression import Const, Expr, Index, Printer, formula, walk
from aios_compile.codegen.linear_index import Linear, product
from aios_compile.codegen.naming import layout, symbol_of
from aios_compile.codegen.operand import Dim, Operand
from aios_compile.codegen.reference import Grid, infer_sizes, new_outputs
from aios_compile.codegen.source import KernelSource

PIECE = 4096  # elements of a long row that are one work item
MAX_VARIANTS = 16

Range = tuple[int, "int | None"]


@dataclass(frozen=True)
class Variant:
    """One part of the iteration space: low..high for each dimension (None: to the end)."""

    ranges: tuple[Range, ...]
    leaves: tuple[Access, ...]
    values: tuple[Expr, ...]
    stores: tuple[Linear, ...]


@dataclass(frozen=True)
class PointwiseSpec:
    """All that the text depends on. Operands: inputs, then outputs."""

    name: str
    operands: tuple[Operand, ...]
    num_outputs: int
    shape: tuple[Dim, ...]
    variants: tuple[Variant, ...]
    model_lines: tuple[str, ...] = ()

    def outputs(self) -> range:
        return range(len(self.operands) - self.num_outputs, len(self.operands))


def spec_of(
    body: fx.GraphModule, operands: Sequence[Operand], name: str | None = None
) -> PointwiseSpec | None:
    """Return the spec of a kernel body, or None when a node of it is not pointwise or a copy.

    `operands`: the body's inputs in placeholder order, then its outputs, with their real strides.
    All outputs must have the same shape.
    """
    nodes = outputs(body)
    shapes = {shape_of(node) for node in nodes}
    if len(shapes) != 1:
        return None
    shape = shapes.pop() or (1,)
    try:
        variants = _variants(body, operands, nodes, shape)
    except NotExpressible:
        return None
    spec = PointwiseSpec(
        name or noun(body, "copy"), tuple(operands), len(nodes), shape, variants, model_lines(body)
    )
    return collapse(spec)


def _variants(
    body: fx.GraphModule,
    operands: Sequence[Operand],
    nodes: Sequence[fx.Node],
    shape: Sequence[Dim],
) -> tuple[Variant, ...]:
    """Cut the iteration space until no rule asks for another cut."""
    done: list[Variant] = []
    todo: list[tuple[Range, ...]] = [tuple((0, s if isinstance(s, int) else None) for s in shape)]
    while todo:
        ranges = todo.pop(0)
        variant, cuts = _variant(body, operands, nodes, ranges)
        if cuts and len(todo) + len(done) < MAX_VARIANTS:
            dim, place = min(cuts)
            low, high = ranges[dim]
            for part in ((low, place), (place, high)):
                todo.append((*ranges[:dim], part, *ranges[dim + 1 :]))
        else:
            done.append(variant)
    return tuple(sorted(done, key=lambda v: tuple(r[0] for r in v.ranges)))


def _variant(
    body: fx.GraphModule,
    operands: Sequence[Operand],
    nodes: Sequence[fx.Node],
    ranges: tuple[Range, ...],
) -> tuple[Variant, set[tuple[int, int]]]:
    reader = Reader(body, operands, ranges)
    at = tuple(Linear() if r == (0, 1) else Linear.of(Index(d)) for d, r in enumerate(ranges))
    outs = operands[len(operands) - len(nodes) :]
    values, stores = [], []
    for node, operand in zip(nodes, outs):
        place: Coordinates = at if shape_of(node) else ()
        values.append(reader.at(node, place))
        stores.append(address_of(operand, place))
    leaves = tuple(leaf for leaf in reader.leaves if isinstance(leaf, Access))
    return Variant(ranges, leaves, tuple(values), tuple(stores)), reader.cuts


def collapse(spec: PointwiseSpec) -> PointwiseSpec:
    """Merge adjacent dimensions that every access walks as one, so that rows are long."""
    if len(spec.variants) != 1:
        return spec
    (variant,) = spec.variants
    linears = [leaf.address for leaf in variant.leaves] + list(variant.stores)
    indexed = any(isinstance(e, Index) for v in variant.values for e in walk(v))
    if indexed or not all(linear.is_affine() for linear in linears):
        return spec
    groups: list[list[int]] = []
    for dim, size in enumerate(spec.shape):
        if groups and all(
            linear.coefficient(groups[-1][-1]) == product((linear.coefficient(dim), size))
            for linear in linears
        ):
            groups[-1].append(dim)
        elif size != 1:
            groups.append([dim])
    groups = groups or [[0]]
    place = {group[-1]: Linear.of(Index(new)) for new, group in enumerate(groups)}

    def moved(linear: Linear) -> Linear:
        return linear.map(
            lambda a: place.get(a.dim, Linear()) if isinstance(a, Index) else Linear()
        )

    shape = tuple(product([spec.shape[d] for d in group]) for group in groups)
    ranges = tuple((0, s if isinstance(s, int) else None) for s in shape)
    leaves = tuple(Access(leaf.operand, moved(leaf.address)) for leaf in variant.leaves)
    merged = Variant(ranges, leaves, variant.values, tuple(map(moved, variant.stores)))
    return PointwiseSpec(
        spec.name, spec.operands, spec.num_outputs, shape, (merged,), spec.model_lines
    )


def reference(spec: PointwiseSpec, *tensors: Tensor) -> list[Tensor]:
    """Compute the outputs in torch from the spec alone, over all coordinates at once."""
    sizes = infer_sizes(spec.operands, tensors)
    results = new_outputs(spec.operands[-spec.num_outputs :], sizes)
    for variant in spec.variants:
        grid = Grid(spec.shape, variant.ranges, sizes, variant.leaves, tensors)
        for out, value, store in zip(results, variant.values, variant.stores):
            grid.put(out, store, grid.value(value))
    return results


def emit(spec: PointwiseSpec) -> KernelSource:
    """Return the kernel. Raises nothing: a spec can always be written."""
    symbol, rank = symbol_of(spec.name, spec), len(spec.shape)
    inner = spec.shape[-1]
    pieces = 1 if isinstance(inner, int) and inner <= 2 * PIECE else None
    count = "1" if pieces else f"(({dim_c(inner)} + {PIECE - 1}) / {PIECE})"
    rows = product(spec.shape[:-1])
    items = dim_c(rows) if pieces else f"{dim_c(rows)} * {count}"
    lines = [
        pointer(operand, i, i in spec.outputs()) for i, operand in enumerate(spec.operands)
        if i in spec.outputs() or _is_read(spec, i)
    ]  # fmt: skip
    lines += ["for (int64_t item = begin; item < end; ++item) {"]
    lines += indent(_decode(spec.shape, None if pieces else count))
    for variant in spec.variants:
        lines += indent(_write_variant(spec, variant, rank))
    lines += ["}"]
    text = frame(symbol, _comment(spec), items, lines)
    return KernelSource(
        spec.name, symbol, "cpp", text, len(spec.operands), inplace(spec), spec.model_lines
    )


def _is_read(spec: PointwiseSpec, operand: int) -> bool:
    return any(leaf.operand == operand for v in spec.variants for leaf in v.leaves)


def _decode(shape: Sequence[Dim], count: str | None) -> list[str]:
    """Return the lines that turn `item` into coordinates and the piece [low, high) of the row."""
    rank, inner, lines = len(shape), dim_c(shape[-1]), []
    row = "item" if count is None else f"item / {count}"
    if count is None:
        lines += [f"const int64_t low = 0, high = {inner};"]
    else:
        lines += [f"const int64_t low = item % {count} * {PIECE};"]
        lines += [f"const int64_t high = min(low + {PIECE}, (int64_t){inner});"]
    for dim in range(rank - 1):
        below = product(shape[dim + 1 : -1])
        place = row if below == 1 else f"{row} / {dim_c(below)}"
        above = "" if dim == 0 else f" % {dim_c(shape[dim])}"
        lines += [f"const int64_t i{dim} = {f'({place})' if above else place}{above};"]
    return lines


def _write_variant(spec: PointwiseSpec, variant: Variant, rank: int) -> list[str]:
    nest = Nest(spec.operands, variant.leaves, rank)
    stores = list(zip(spec.outputs(), variant.stores))
    vector = nest.can_vectorize(variant.values, stores)
    low, high = variant.ranges[-1]
    begin = "low" if low == 0 else f"max(low, INT64_C({low}))"
    whole = high is None or high == spec.shape[-1]
    end = "high" if whole else f"min(high, INT64_C({high}))"
    before: list[str] = []
    values: Sequence[Expr] = variant.values
    if vector:
        before, loads, values = nest.vector_parts(values)
        printer = Printer(Cpp(True, tuple(f"i{d}" for d in range(rank))))
    else:
        loads, printer = nest.scalar_loads(values), nest.scalar()
    body, texts = printer.statements(values, loads)
    results = [_spread(value, text, vector) for value, text in zip(values, texts)]
    if len(results) > 1:  # all is read before anything is written: outputs may share inputs' memory
        for k, value in enumerate(values):
            body.append(nest.declare(value.dtype, f"r{k}", results[k], vector))
            results[k] = f"r{k}"
    for (operand, address), result in zip(stores, results):
        body.append(nest.store(operand, address, result, vector))
    i = f"i{rank - 1}"
    if vector:
        loop = [f"for_lanes({begin}, {end}, [&](int64_t {i}, auto count) {{"]
        loop += [*indent(body), "});"]
    else:
        loop = [f"for (int64_t {i} = {begin}; {i} < {end}; ++{i}) {{", *indent(body), "}"]
    return _guarded(spec, variant, before + loop)


def _spread(value: Expr, text: str, vector: bool) -> str:
    """Return a result as a vector where it is a bare number."""
    return f"splat({text})" if vector and isinstance(value, Const) else text


def _guarded(spec: PointwiseSpec, variant: Variant, lines: list[str]) -> list[str]:
    conditions = []
    for dim, (low, high) in enumerate(variant.ranges[:-1]):
        if low > 0:
            conditions.append(f"i{dim} >= {low}")
        if high is not None and high != spec.shape[dim]:
            conditions.append(f"i{dim} < {high}")
    if not conditions and len(spec.variants) == 1:
        return lines
    return [f"if ({' && '.join(conditions)}) {{" if conditions else "{", *indent(lines), "}"]


def _comment(spec: PointwiseSpec) -> list[str]:
    lines = [f"{spec.name}: pointwise"]
    for variant in spec.variants[:4]:
        names = [spec.operands[leaf.operand].name for leaf in variant.leaves]
        for index, value in zip(spec.outputs(), variant.values):
            text = f"{spec.operands[index].name} = {formula(value, names)}"
            lines.append(text if len(text) < 400 else f"{text[:400]} ...")
    lines += [f"  {layout(operand)}" for operand in spec.operands]
    lines += ["bytes: each operand once", *(f"model: {line}" for line in spec.model_lines)]
    return list(dict.fromkeys(lines))


def inplace(spec: PointwiseSpec) -> tuple[tuple[int, int], ...]:
    """Return the (output, input) pairs of one dtype that are only touched at the same address."""
    pairs = []
    for number, index in enumerate(spec.outputs()):
        for operand in range(len(spec.operands) - spec.num_outputs):
            if spec.operands[operand].dtype != spec.operands[index].dtype:
                continue
            touched = [
                leaf.address == variant.stores[number]
                for variant in spec.variants
                for leaf in variant.leaves
                if leaf.operand == operand
            ]
            if touched and all(touched):
                pairs.append((number, operand))
    return tuple(pairs)
