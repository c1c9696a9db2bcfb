"""Find out how long a sequence may be, for example as long as the model's tables of positions.

Eager PyTorch raises for a position beyond a table. A kernel must not read there either, so no
request may get that far. If the model's code asks whether T is less than some number, only one of
the two branches was captured, so that number is a limit as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from aios_compile.errors import CaptureError
from aios_compile.ir import ops, provenance
from aios_compile.ir.counted_tokens import ARANGES, counted_from
from aios_compile.ir.module import IRModule, LengthLimit, is_region_call, placeholders

aten = torch.ops.aten
assert ops.TABLE
SAME = (
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.clone.default,
    aten.alias.default,
    aten._to_copy.default,
)


SAMPLES = (2, 3, 16, 17)  # every guard has to hold for a few tokens
FAR = 1 << 30
FIRST_ROWS = range(4)  # of a table that is read from there on


def guard_limits(mode: Any, max_tokens: int, sizes: Iterable[int]) -> list[LengthLimit]:
    """Return the upper bounds on T among the guards.

    sizes: those of the model's tables, which a bound may come from. Raises CaptureError for a guard
    that is no upper bound, and for a smaller one than max_tokens that no table explains.
    """
    ends = {size - first for size in sizes for first in FIRST_ROWS}
    found = []
    for guard in mode.shape_env.guards:
        line = line_of(getattr(guard, "sloc", None))

        def holds(tokens: int, expr: Any = guard.expr) -> bool:
            return bool(expr.subs(dict.fromkeys(expr.free_symbols, tokens)))

        low, high = max(SAMPLES), FAR
        tried = (*SAMPLES, 64, max_tokens, FAR)
        if all(map(holds, tried)):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        is_bound = all(holds(t) == (t <= low) for t in tried)
        if not is_bound or (low < max_tokens and low not in ends):
            raise CaptureError(
                f"the model specialises on the token count: {guard.expr}",
                source_line=line,
                advice="remove the branch on the sequence length, or lower max_num_batched_tokens",
            )
        found.append(LengthLimit(low, line or ""))
    return found


def line_of(place: Any) -> str | None:
    """Return the model line of a guard, its file by name: torch shortens paths by its own place."""
    text, _, where = (getattr(place, "maybe_user_loc", None) or "").rpartition("  # ")
    return f"{where.rpartition('/')[2]}: {text}" if where else None


def table_limits(module: IRModule) -> list[LengthLimit]:
    """Return a limit for each table that is read at `positions`, or so many rows further."""
    names = module.inputs
    known = {n: 0 for n in placeholders(module.root.graph) if names.get(n.name) == "positions"}
    return list(_limits(module.root, known, module.mode))


def _limits(
    graph_module: fx.GraphModule, known: dict[fx.Node, int], mode: Any
) -> Iterator[LengthLimit]:
    """Walk a graph; `known` holds what is a position, and how much was added to it."""
    for node in graph_module.graph.nodes:
        if is_region_call(graph_module, node):
            region = graph_module.get_submodule(str(node.target))
            assert isinstance(region, fx.GraphModule)
            inner = placeholders(region.graph)
            given = {h: known[a] for h, a in zip(inner, node.args) if a in known}
            yield from _limits(region, given, mode)
        elif node.op == "call_function":
            offset = _offset(node, known, mode)
            if offset is not None:
                known[node] = offset
            for size, index in _look_ups(node):
                if index in known and isinstance(size, int):
                    yield LengthLimit(size - known[index], provenance.source_line(node))


def _offset(node: Any, known: dict[fx.Node, int], mode: Any) -> int | None:
    """Return how much a node is more than a position; None where it is none."""
    if node.target in ARANGES:
        return counted_from(node, mode)
    if node.target in SAME:
        return known.get(node.args[0])
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        first, second = node.args
        if first in known and type(second) is int:
            return known[first] + (second if node.target is aten.add.Tensor else -second)
    return None


def _look_ups(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (rows, index) of a table that a node reads."""
    if node.target is aten.embedding.default:
        yield node.args[0].meta["val"].shape[0], node.args[1]
    elif node.target is aten.index_select.default:
        table, dim, index = node.args
        yield table.meta["val"].shape[dim], index
    elif node.target is aten.index.Tensor:
        for size, index in zip(node.args[0].meta["val"].shape, node.args[1]):
            yield size, index
