"""How far back any layer of a program looks."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import IRModule


def window_tokens(module: IRModule) -> int | None:
    """Return the most keys that a query sees in any layer; None: some layer sees all of them.

    A chunk of c positions shows a query its own chunk, so never more than c keys.
    """
    bounds: list[int | None] = []
    for part in module.root.modules():
        if isinstance(part, fx.GraphModule):
            bounds += [_bound(node) for node in part.graph.nodes if _is_attention(node)]
    known = [bound for bound in bounds if bound is not None]
    return max(known) if known and len(known) == len(bounds) else None


def _is_attention(node: fx.Node) -> bool:
    aios = torch.ops.aios
    return node.target in (aios.attention.default, aios.paged_attention.default)


def _bound(node: fx.Node) -> int | None:
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, node.args)) | dict(node.kwargs)
    bounds = [given.get("window"), given.get("chunk")]
    return min((b for b in bounds if isinstance(b, int)), default=None)
