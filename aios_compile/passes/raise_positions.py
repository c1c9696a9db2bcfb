"""Read each token's position from the runtime where the model counts the tokens itself.

A model written for one sequence numbers its tokens with arange(T), or takes the first T rows of a
table. In a flat batch of many sequences, the fifth token of the batch is rarely the fifth token of
a sequence, so both must become the runtime's positions.
"""

from __future__ import annotations

import torch
from torch import fx

from aios_compile.ir.counted_tokens import counted_from, slice_of
from aios_compile.ir.provenance import inherit, source_lines
from aios_compile.passes.context import PassContext
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.match import dtype_of, is_call, positive, rank_of

aten = torch.ops.aten


@graph_pass(numerics="exact")
def raise_positions(graph: fx.Graph, context: PassContext) -> int:
    """Replace arange(T) by the input `positions` [T], and a table's first T rows by a look-up.

    Before::

        def f(table: "weight f32[128, 64]", ids: "input i64[T]"):
            return aten.slice.Tensor(table, 0, 0, aten.sym_size.int(ids, 0))

    After::

        def f(table: "weight f32[128, 64]", positions: "input i64[T]"):
            return aten.index_select.default(table, 0, positions)
    """
    hits = 0
    for node in list(graph.nodes):
        first = counted_from(node, context.module.mode)
        if first is None or not node.users:
            continue
        positions = context.add_input(graph, "positions", ["T"], torch.int64)
        if not source_lines(positions):  # a graph that only counts has no other line
            inherit(positions, [node])
        with graph.inserting_before(node):
            if first:
                positions = context.call(graph, aten.add.Tensor, positions, first, source=[node])
            if is_call(node, aten.slice.Tensor):
                table, dim = node.args[0], positive(slice_of(node)[0], rank_of(node))
                select = aten.index_select.default
                new = context.call(graph, select, table, dim, positions, source=[node])
            elif dtype_of(node) != torch.int64:
                cast, dtype = aten._to_copy.default, dtype_of(node)
                new = context.call(graph, cast, positions, dtype=dtype, source=[node])
            else:
                new = positions
        node.replace_all_uses_with(new)
        hits += 1
    return hits
