"""Record what every node of a program computes; find where two programs first differ."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.ir.module import IRModule, is_region_call, outputs, placeholders
from aios_compile.passes.fusion_groups import is_view

CLOSE = 1e-7  # of the largest value, between two programs in float64
Where = tuple[str, fx.Node]  # the region call ("" for the outer graph), and a node


@dataclass
class Trace:
    """Values by place, in the order of execution. Use `watch` while the program runs once."""

    module: IRModule
    values: dict[Where, Any] = field(default_factory=dict)
    _inside: dict[fx.Node, Any] = field(default_factory=dict)

    def watch(self, node: fx.Node, value: Any) -> None:
        """Take down a value; a region's nodes come before the call that they belong to."""
        if node.graph is not self.module.root.graph:
            self._inside[node] = value
            return
        if self._inside:
            self.values.update({(node.name, n): v for n, v in self._inside.items()})
            self._inside.clear()
        self.values["", node] = value

    def sources(self, where: Where) -> Iterator[Where]:
        """Yield what a place reads, through the borders of regions."""
        call, node = where
        if call and node.op == "placeholder":
            outer = self._call(call)
            argument = outer.args[placeholders(node.graph).index(node)]
            if isinstance(argument, fx.Node):
                yield "", argument
            return
        for source in node.all_input_nodes:
            region = not call and source.op == "call_module"
            if region and is_region_call(self.module.root, source):
                assert node.target is operator.getitem
                inner = self.module.regions()[str(source.target)]
                yield source.name, outputs(inner.graph)[int(node.args[1])]  # type: ignore[arg-type]
            else:
                yield call, source

    def _call(self, name: str) -> fx.Node:
        return next(
            c for r in self.module.regions() for c in self.module.calls(r) if c.name == name
        )


def first_difference(before: Trace, after: Trace, output: int) -> fx.Node | None:
    """Return the first node of `after` that leads to a wrong output by new values only.

    A value is old when the program before computed it too, whatever its shape; but a node that was
    there before must compute what it did. The path from the wrong output back to the inputs is
    followed as long as values are new.
    """
    known = _by_size(before)
    own = {(call, node.name): value for (call, node), value in before.values.items()}
    new: dict[Where, bool] = {}
    order = {where: i for i, where in enumerate(after.values)}
    for where in order:
        new[where] = _is_another(where, after, own) or _is_new(where, after, new, known)
    result = outputs(after.module.root.graph)[output]
    pending: list[Where] = [("", result)]
    found: set[Where] = set()
    while pending:
        where = pending.pop()
        if where in found or not new.get(where, False):
            continue
        found.add(where)
        pending += after.sources(where)
    computed = [w for w in found if w[1].op in ("call_function", "call_module")]
    return min(computed, key=order.__getitem__)[1] if computed else None


def _is_another(where: Where, after: Trace, own: dict[tuple[str, str], Any]) -> bool:
    """Return whether a node that the pass has left computes other values than it did."""
    call, node = where
    old, value = own.get((call, node.name)), after.values[where]
    if not isinstance(old, Tensor) or not isinstance(value, Tensor) or old.shape != value.shape:
        return False
    if node.op == "placeholder" or not value.is_floating_point():
        return False
    return not _is_close(old, value)


def _is_new(
    where: Where, after: Trace, new: dict[Where, bool], known: dict[int, list[Tensor]]
) -> bool:
    call, node = where
    value = after.values[where]
    if node.op == "placeholder":
        return bool(call) and any(new.get(s, False) for s in after.sources(where))
    if isinstance(value, (tuple, list)):
        items = [v for v in value if isinstance(v, Tensor) and v.is_floating_point()]
        return not all(_is_known(v, known) for v in items)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return any(new.get(s, False) for s in after.sources(where))
    if is_view(node) and node.op == "call_function":
        moved = any(new.get(s, False) for s in after.sources(where))
        return moved and not _is_known(value, known)
    return not _is_known(value, known)


def _by_size(trace: Trace) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for value in trace.values.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, Tensor) and item.is_floating_point():
                found.setdefault(item.numel(), []).append(item.reshape(-1).double())
    return found


def _is_close(value: Tensor, other: Tensor) -> bool:
    scale = float(value.abs().max()) if value.numel() else 0.0
    pair = value.double(), other.double()
    return torch.allclose(*pair, rtol=0.0, atol=CLOSE * max(scale, 1e-30))


def _is_known(value: Tensor, known: dict[int, list[Tensor]]) -> bool:
    flat = value.reshape(-1).double()
    turned = [flat]
    if value.dim() == 3:  # heads before or after tokens
        turned.append(value.transpose(0, 1).reshape(-1).double())
    return any(_is_close(t, k) for k in known.get(flat.numel(), ()) for t in turned)
