"""Replace max and min of sizes where the largest T decides them, so that sizes stay polynomials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx


def decide_bounds(modules: Sequence[fx.GraphModule], max_tokens: int) -> None:
    """Replace max(0, 128 - T) by the side that is larger for every step's T: sizes stay sums.

    A table's last T rows are cut like this. Where neither side always wins nothing is changed.
    """
    for module in modules:
        for node in list(module.graph.nodes):
            if node.op != "call_function" or node.target not in (torch.sym_max, torch.sym_min):
                continue
            difference = _expression(node.args[0]) - _expression(node.args[1])
            symbols = difference.free_symbols
            ends = {bool(difference.subs(dict.fromkeys(symbols, t)) >= 0) for t in (1, max_tokens)}
            if len(ends) == 1 and all(difference.diff(s, 2) == 0 for s in symbols):
                first = ends.pop() == (node.target is torch.sym_max)
                node.replace_all_uses_with(node.args[0 if first else 1])
                module.graph.erase_node(node)
        module.recompile()


def _expression(size: Any) -> Any:
    value = size.meta["example_value"] if isinstance(size, fx.Node) else size
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)
