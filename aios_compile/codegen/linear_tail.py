"""What follows a matrix product in a kernel's body: every output over (token, column).

Both targets read their linears' bodies here, so a tail fuses on one exactly if it does on the
other, the vectors of the C++ target aside.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from aios_compile.codegen.access import (
    Access,
    Coordinates,
    NotExpressible,
    Reader,
    outputs,
    shape_of,
    store_address,
)
from aios_compile.codegen.expression import Expr, Index, call
from aios_compile.codegen.linear_index import Linear
from aios_compile.codegen.operand import Dim, Operand


@dataclass(frozen=True)
class Tail:
    """streams: 1, or 2 when the outputs combine the halves of the product's columns.

    leaves: what the values read; operand number len(operands) + s is the sum of stream s. values,
    stores: each output's expression and address over (token, column).
    """

    streams: int
    leaves: tuple[Access, ...]
    values: tuple[Expr, ...]
    stores: tuple[Linear, ...]


def streams_of(body: fx.GraphModule, rows: int) -> int | None:
    """Return 1, or 2 when the outputs combine the halves of a product with a matrix of `rows` rows.

    None for outputs of other widths.
    """
    widths = {shape_of(r)[-1] for r in outputs(body)}
    if widths == {rows}:
        return 1
    return 2 if widths == {rows // 2} and rows % 2 == 0 else None


def read_tail(
    body: fx.GraphModule,
    operands: Sequence[Operand],
    product: fx.Node,
    bias: Any,
    num_tokens: Dim,
    rows: int,
) -> Tail | None:
    """Return the tail of `product`, whose matrix has `rows` rows, in a body of these operands.

    None when the tail is not pointwise, or splits the product other than into two halves.
    """
    results = outputs(body)
    streams = streams_of(body, rows)
    if streams is None:
        return None
    columns = rows // streams

    def sum_of(reader: Reader, at: fx.Node, coordinates: Coordinates) -> Expr | None:
        if at is not product:
            return None
        column = coordinates[-1]
        stream_at = {s * columns: s for s in range(streams)}
        if column.without(1) != Linear((), column.constant) or column.constant not in stream_at:
            raise NotExpressible(f"the tail reads column {column} of a linear")
        if any(c not in (Linear(), Linear.of(Index(0))) for c in coordinates[:-1]):
            raise NotExpressible("the tail mixes tokens of a linear")
        stream = len(operands) + stream_at[column.constant]
        value: Expr = reader.leaf(Access(stream, Linear.of(Index(1))), "f32")
        return value if bias is None else call("add", (value, reader.at(bias, (column,))), "f32")

    reader = Reader(body, operands, ((0, None), (0, columns)), sum_of)
    values, stores = [], []
    for result, out in zip(results, operands[len(operands) - len(results) :]):
        shape = shape_of(result)
        if len(shape) < 2 or any(s != 1 for s in shape[:-2]) or shape[-2] != num_tokens:
            return None
        token = Linear() if shape[-2] == 1 else Linear.of(Index(0))
        place = (*(Linear() for _ in shape[:-2]), token, Linear.of(Index(1)))
        try:
            values.append(reader.at(result, place))
        except NotExpressible:
            return None
        stores.append(store_address(out, place))
    leaves = tuple(leaf for leaf in reader.leaves if isinstance(leaf, Access))
    if reader.cuts or len(leaves) != len(reader.leaves):
        return None
    return Tail(streams, leaves, tuple(values), tuple(stores))


def inplace_pairs(
    operands: Sequence[Operand],
    first_output: int,
    leaves: Sequence[Access],
    stores: Sequence[Linear],
    fixed: Collection[int],
) -> tuple[tuple[int, int], ...]:
    """Return (output, input) pairs that a tail touches at one address; never a `fixed` operand."""
    pairs = []
    for number, store in enumerate(stores):
        for operand in range(first_output):
            same = operands[operand].dtype == operands[first_output + number].dtype
            reads = [leaf.address for leaf in leaves if leaf.operand == operand]
            if same and reads and operand not in fixed and all(r == store for r in reads):
                pairs.append((number, operand))
    return tuple(pairs)
