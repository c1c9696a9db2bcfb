"""out[b, m, n] = beta * bias + alpha * sum over k of left[b, m, k] * right[b, k, n].

The generic fallback, for matrix products that no pass turned into a linear or an attention. Layout:
any strides, so transposed and expanded operands cost no copy; f32, bf16 and f16, accumulated in
float32. Bytes moved: right once for each row of left. Items: rows (b, m) in pieces of 256 columns.
Order of the sum: where right is dense along n, one chain over k = 0, 1, ...; else lane l adds k =
l, l + VL, ... and the lanes are added as a tree. Neither depends on the sizes or on the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from aios_compile.codegen.access import (
    Access,
    NotExpressible,
    Reader,
    address_of,
    model_lines,
    noun,
    outputs,
    shape_of,
)
from aios_compile.codegen.cpp.dialect import VECTORS, number
from aios_compile.codegen.cpp.frame import dim_c, frame, indent, pointer
from aios_compile.codegen.cpp.nest import Nest
from aios_compile.codegen.expression import Call, Const, Expr, Index, Load
from aios_compile.codegen.linear_index import Linear
from aios_compile.codegen.naming import layout, symbol_of, variable
from aios_compile.codegen.operand import Dim, Operand
from aios_compile.codegen.pointwise_ops import op_name
from aios_compile.codegen.reference import Grid, infer_sizes, new_outputs
from aios_compile.codegen.source import KernelSource

COLUMNS = 256  # of one work item
B, M, N, K = (Linear.of(Index(d)) for d in range(4))
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")

ALONG_N = """\
for_lanes(low, high, [&](int64_t i2, auto count) {{
  vf sum = vf{{}};
  for (int64_t i3 = 0; i3 < {k}; ++i3) {{
    sum = fma(splat(load1({left} + {left_at})), load({right} + {right_at}, count), sum);
  }}
  const vf result = {result};
  {store}
}});"""

ALONG_K = """\
for (int64_t i2 = low; i2 < high; ++i2) {{
  vf sums = vf{{}};
  for_lanes(0, {k}, [&](int64_t i3, auto count) {{
    sums = fma({left_load}, {right_load}, sums);
  }});
  const float sum = reduce_add(sums);
  const float result = {result};
  {store}
}}"""


@dataclass(frozen=True)
class MatmulSpec:
    """All that the text depends on. Coordinates: 0 batch, 1 row, 2 column, 3 reduced."""

    name: str
    operands: tuple[Operand, ...]
    shape: tuple[Dim, Dim, Dim, Dim]
    left: Access
    right: Access
    bias: Access | None
    alpha: float
    beta: float
    store: Linear
    model_lines: tuple[str, ...] = ()


def spec_of(
    body: fx.GraphModule, operands: Sequence[Operand], name: str | None = None
) -> MatmulSpec | None:
    """Return the spec of a body that is one matrix product over views of its inputs, or None."""
    results = outputs(body)
    if len(results) != 1 or op_name(results[0]) not in PRODUCTS:
        return None
    node = results[0]
    args: Any = node.args
    bias, left, right = args if op_name(node).endswith(("addmm", "baddbmm")) else (None, *args[:2])
    batched = op_name(node).endswith("bmm")
    batch: Sequence[Dim] = shape_of(node)[:1] if batched else (1,)
    m, n = shape_of(node)[-2:]
    reader = Reader(body, operands, ((0, None),) * 4)
    lead = (B,) if batched else ()
    try:
        found = [
            _access(reader, reader.at(left, (*lead, M, K))),
            _access(reader, reader.at(right, (*lead, K, N))),
            None if bias is None else _access(reader, reader.broadcast(bias, (*lead, M, N))),
        ]
    except NotExpressible:
        return None
    a, b, c = found
    if a is None or b is None or (bias is not None and c is None):
        return None
    if any(o.dtype not in ("f32", "bf16", "f16") for o in operands):
        return None
    scales: Any = node.kwargs
    return MatmulSpec(
        name or noun(body, "matmul"),
        tuple(operands),
        (batch[0], m, n, shape_of(left)[-1]),
        a,
        b,
        c,
        float(scales.get("alpha", 1)),
        float(scales.get("beta", 1)),
        address_of(operands[-1], (*lead, M, N)),
        model_lines(body),
    )


def _access(reader: Reader, expr: Expr) -> Access | None:
    """Return the plain strided read that an expression is, or None."""
    while isinstance(expr, Call) and expr.op == "cast" and expr.dtype == "f32":
        expr = expr.args[0]
    leaf = reader.leaves[expr.index] if isinstance(expr, Load) else None
    return leaf if isinstance(leaf, Access) and leaf.address.is_affine() else None


def reference(spec: MatmulSpec, *tensors: Tensor) -> list[Tensor]:
    """Compute the output in torch from the spec alone."""
    sizes = infer_sizes(spec.operands, tensors)
    (out,) = new_outputs(spec.operands[-1:], sizes)
    leaves = [a for a in (spec.left, spec.right, spec.bias) if a is not None]
    whole = [(0, s if isinstance(s, int) else None) for s in spec.shape]
    grid = Grid(spec.shape, whole, sizes, leaves, tensors)
    result = spec.alpha * (grid.value(Load(0)) * grid.value(Load(1))).sum(-1, keepdim=True)
    if spec.bias is not None:
        result = result + spec.beta * Grid(
            (*spec.shape[:3], 1), [*whole[:3], (0, 1)], sizes, leaves, tensors
        ).value(Load(2))
    row = Grid((*spec.shape[:3], 1), [*whole[:3], (0, 1)], sizes, leaves, tensors)
    row.put(out, spec.store, result)
    return [out]


def emit(spec: MatmulSpec) -> KernelSource:
    """Return the kernel."""
    symbol = symbol_of(spec.name, spec)
    leaves = [a for a in (spec.left, spec.right, spec.bias) if a is not None]
    nest = Nest(spec.operands, leaves, 4)
    along_n = spec.right.address.coefficient(2) == 1 and _stored_dense(spec)
    batch, m, n, k = (dim_c(d) for d in spec.shape)
    pieces = f"(({n} + {COLUMNS - 1}) / {COLUMNS})"
    lines = [pointer(o, i, i == len(spec.operands) - 1) for i, o in enumerate(spec.operands)]
    lines += ["for (int64_t item = begin; item < end; ++item) {"]
    head = [f"const int64_t low = item % {pieces} * {COLUMNS};"]
    head += [f"const int64_t high = min(low + {COLUMNS}, (int64_t){n});"]
    head += [f"const int64_t i1 = (item / {pieces}) % {m};"]
    if batch != "1":
        head += [f"const int64_t i0 = item / {pieces} / {m};"]
    text = (ALONG_N if along_n else ALONG_K).format(**_holes(spec, nest, along_n, k))
    lines += [*indent(head), *indent(text.split("\n")), "}"]
    comment = [f"{spec.name}: out[b, m, n] = sum over k of left[b, m, k] * right[b, k, n]"]
    comment += [f"  {layout(o)}" for o in spec.operands]
    comment += ["bytes: the right side once a row", *(f"model: {x}" for x in spec.model_lines)]
    items = f"{batch} * {m} * {pieces}"
    return KernelSource(
        spec.name, symbol, "cpp", frame(symbol, comment, items, lines), len(spec.operands),
        (), spec.model_lines,
    )  # fmt: skip


def _stored_dense(spec: MatmulSpec) -> bool:
    return spec.operands[-1].dtype in VECTORS


def _holes(spec: MatmulSpec, nest: Nest, along_n: bool, k: str) -> dict[str, str]:
    def place(access: Access) -> str:
        return f"({nest.address(access.address)})"

    result = "sum" if spec.alpha == 1 else f"{number(Const(spec.alpha))} * sum"
    if spec.bias is not None:
        scale = "" if spec.beta == 1 else f"{number(Const(spec.beta))} * "
        result = f"{scale}{_read(nest, spec.bias, 2, along_n)} + {result}"
    last = len(spec.operands) - 1
    step = spec.store.coefficient(2)
    target = f"{variable(spec.operands[-1], last)} + ({nest.address(spec.store)})"
    store = f"store1({target}, result);"
    if along_n:
        store = f"store({target}, result, count);"
        if step != 1:
            store = f"store_strided({target}, {dim_c(step)}, result, count);"
    return {
        "k": k,
        "left": variable(spec.operands[spec.left.operand], spec.left.operand),
        "left_at": place(spec.left),
        "right": variable(spec.operands[spec.right.operand], spec.right.operand),
        "right_at": place(spec.right),
        "left_load": _read(nest, spec.left, 3, True),
        "right_load": _read(nest, spec.right, 3, True),
        "result": result,
        "store": store,
    }


def _read(nest: Nest, access: Access, dim: int, vector: bool) -> str:
    """Return the text that reads lanes along `dim`, or one element."""
    name = variable(nest.operands[access.operand], access.operand)
    place = f"{name} + ({nest.address(access.address)})"
    step = access.address.coefficient(dim)
    if not vector:
        return f"load1({place})"
    if step == 0:  # the same element for every k: lanes past the end must not count it
        text = f"splat(load1({place}))"
        return f"keep({text}, count, 0.0f)" if dim == 3 else text
    return f"load({place}, count)" if step == 1 else f"load_strided({place}, {dim_c(step)}, count)"
