"""Compute a node of a program on real tensors at a chosen token count.

Passes use it to find out what a mask or a rearrangement does by running it. The inputs of a region
are looked up at the region's calls. Runtime inputs other than positions have no known value, and
neither have most weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.ir.module import placeholders
from aios_compile.ir.symbols import size_names
from aios_compile.passes.context import PassContext


class Unknown(Exception):
    """What a node depends on and nobody knows while compiling."""


class Concrete:
    """Values of nodes where T is the number of `positions` and the region is at its call `call`."""

    def __init__(
        self,
        context: PassContext,
        positions: Tensor,
        given: dict[fx.Node, Tensor] | None = None,
        call: int = 0,
    ) -> None:
        self.context = context
        self.positions = positions
        self.values: dict[fx.Node, Any] = dict(given or {})
        self.call = call

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self._compute(node)
        return self.values[node]

    def _compute(self, node: fx.Node) -> Any:
        if isinstance(node.meta.get("val"), torch.SymInt):
            return self.size(node.meta["val"])
        if node.op == "placeholder":
            return self._input(node)
        if node.op != "call_function":
            raise Unknown(f"{node.name}, which another region computes")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def size(self, value: Any) -> int:
        """Return a size with the token count put in for T."""
        if isinstance(value, int):
            return value
        names = size_names(self.context.module.mode)
        expr = value.node.expr
        if any(names.get(str(s)) != "T" for s in expr.free_symbols):
            raise Unknown(f"the size {expr}")
        return int(expr.subs({s: len(self.positions) for s in expr.free_symbols}))

    def _input(self, node: fx.Node) -> Any:
        module, region = self.context.module, self.context.region
        outer: Any = node
        if region and node.graph is not module.root.graph:
            outer = module.calls(region)[self.call].args[placeholders(node.graph).index(node)]
            if outer.op != "placeholder":
                return self.value(outer)
        if outer.name in module.weights:
            recipe = module.weights[outer.name]
            if any(name not in module.tensors for name in recipe.names):
                raise Unknown(f"the weight {recipe.text()}")
            return recipe.run(module.tensors)
        name = module.inputs.get(outer.name, outer.name)
        if name != "positions":
            raise Unknown(name)
        return self.positions.reshape([self.size(s) for s in outer.meta["val"].shape])


def ancestors(node: fx.Node, context: PassContext) -> Iterator[fx.Node]:
    """Yield a node and all that it depends on, through region inputs (at the first call)."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        yield current
        sources = list(current.all_input_nodes)
        if current.op == "placeholder" and current.graph is not context.module.root.graph:
            call = context.module.calls(context.region)[0]
            bound = call.args[placeholders(current.graph).index(current)]
            sources = [bound] if isinstance(bound, fx.Node) else []
        for source in sources:
            if source not in seen:
                seen.add(source)
                stack.append(source)
