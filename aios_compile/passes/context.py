"""What a pass may do besides editing its graph: add weights, inputs and states, and refuse."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.ir import provenance
from aios_compile.ir.module import IRModule, Recipe, outputs, placeholders
from aios_compile.ir.refresh import value_of
from aios_compile.ir.symbols import new_fake


@dataclass(frozen=True)
class Refusal:
    """A pattern that almost matched: why not, and at which model line."""

    reason: str
    source_line: str = ""


@dataclass(frozen=True)
class PassOptions:
    """The settings that passes read. Dtypes are torch dtypes; page_size counts tokens.

    quantization: the name of a format (ir/quant_format.py) for the weights of linears, or "".
    bf16_dot: whether the processor multiplies pairs of bf16 (passes/round_activations.py).
    quantize_kv: keep keys and values as codes with a scale a token and head, "int8" or "e4m3", or
    "". quantize_embeddings: quantise tables that are looked up as well. kept_weights: (checkpoint
    name, reason) of weights that are not quantised because they would lose too much.
    """

    target: str = "cpp"
    page_size: int = 16
    kv_dtype: torch.dtype = torch.float32
    num_pages: int = 64
    max_pages_per_sequence: int = 8
    quantization: str = ""
    bf16_dot: bool = False
    quantize_kv: str = ""
    quantize_embeddings: bool = False
    kept_weights: tuple[tuple[str, str], ...] = ()


@dataclass
class PassContext:
    """The view of the program that a pass gets while it works on one graph."""

    module: IRModule
    region: str = ""
    options: PassOptions = field(default_factory=PassOptions)
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def graph_module(self) -> fx.GraphModule:
        return self.module.graphs()[self.region]

    def refuse(self, refusal: Refusal) -> None:
        """Record why a near miss was left alone (each reason once a line)."""
        if refusal not in self.refusals:
            self.refusals.append(refusal)

    def call(
        self, graph: fx.Graph, target: Any, *args: Any, source: Iterable[fx.Node], **kwargs: Any
    ) -> fx.Node:
        """Insert target(*args) at the insertion point, with its fake value and provenance."""
        node = graph.call_function(target, args, kwargs)
        node.meta["val"] = fake_value(node, self.module)
        provenance.inherit(node, source)
        return node

    def is_weight(self, node: Any) -> bool:
        """Return whether a node is a placeholder bound to checkpoint weights in every call."""
        return isinstance(node, fx.Node) and all(
            n.name in self.module.weights for n in self._bound(node)
        )

    def recipes(self, node: fx.Node) -> list[Recipe]:
        """Return the recipe of a weight placeholder for each call of the region."""
        return [self.module.weights[n.name] for n in self._bound(node)]

    def add_weight(
        self, graph: fx.Graph, name: str, sources: Sequence[fx.Node], build: Callable[..., Any]
    ) -> fx.Node:
        """Add a weight placeholder whose value is build(*sources), computed by the loader.

        `build` is traced over torch functions; `sources` are weight placeholders of this graph.
        The region gets one placeholder, each call its own outer weight with the composed recipe.
        """
        value = self._fake_build(sources, build)
        per_call = list(zip(*(self.recipes(s) for s in sources)))
        composed = [Recipe.compose(build, recipes) for recipes in per_call]
        return self.add_recipes(graph, name, value, composed)

    def add_recipes(
        self, graph: fx.Graph, name: str, value: Tensor, recipes: Sequence[Recipe]
    ) -> fx.Node:
        """Add a weight placeholder like the fake `value`, with a recipe for each call."""
        if not self.region:
            node = self._placeholder(graph, name, value)
            self.module.weights[node.name] = recipes[0]
            return node
        outer = []
        for i, recipe in enumerate(recipes):
            holder = self._placeholder(self.module.root.graph, f"{self.region}_{i}_{name}", value)
            self.module.weights[holder.name] = recipe
            outer.append(holder)
        return self._bind(graph, name, value, outer)

    def add_input(
        self, graph: fx.Graph, name: str, shape: Sequence[Any], dtype: torch.dtype
    ) -> fx.Node:
        """Return the placeholder of the runtime input `name`, added and threaded through once."""
        root = self.module.root.graph
        outer = next(
            (n for n in placeholders(root) if self.module.inputs.get(n.name) == name), None
        )
        if outer is None:
            value = new_fake(self.module.mode, shape, dtype)
            outer = self._placeholder(root, name, value)
            self.module.inputs[outer.name] = name
        if not self.region:
            return outer
        calls = self.module.calls(self.region)
        for i, inner in enumerate(placeholders(graph)):
            if all(call.args[i] is outer for call in calls):
                return inner
        return self._bind(graph, name, outer.meta["val"], [outer] * len(calls))

    def add_state(
        self, graph: fx.Graph, name: str, shape: Sequence[Any], dtype: torch.dtype
    ) -> fx.Node:
        """Add a state (a KV cache), one for each call of the region; see set_next_state."""
        value = new_fake(self.module.mode, shape, dtype)
        count = len(self.module.calls(self.region)) if self.region else 1
        root = self.module.root.graph
        label = f"{self.region}_{{}}_{name}" if self.region else name
        outer = [self._placeholder(root, label.format(i), value) for i in range(count)]
        for holder in outer:
            self.module.states[holder.name] = -1
        return self._bind(graph, name, value, outer) if self.region else outer[0]

    def set_next_state(self, graph: fx.Graph, state: fx.Node, value: fx.Node) -> None:
        """Declare `value` the state after this step; it becomes an output of region and root."""
        root = self.module.root.graph
        if not self.region:
            self._set_root_output(state.name, value)
            return
        output = graph.output_node()
        index = len(outputs(graph))
        output.args = ((*outputs(graph), value),)
        position = placeholders(graph).index(state)
        for call in self.module.calls(self.region):
            call.meta["val"] = (*call.meta["val"], value.meta["val"])
            with root.inserting_after(call):
                item = root.call_function(operator.getitem, (call, index))
            item.meta["val"] = value.meta["val"]
            provenance.inherit(item, [value])
            holder = call.args[position]
            assert isinstance(holder, fx.Node)
            self._set_root_output(holder.name, item)

    def drop_state(self, graph: fx.Graph, state: fx.Node) -> None:
        """Forget a state that the graph no longer writes, and its next values."""
        position = placeholders(graph).index(state)
        for call in self.module.calls(self.region) if self.region else (None,):
            holder = state if call is None else call.args[position]
            assert isinstance(holder, fx.Node)
            index = self.module.states[holder.name]
            output = self.module.root.graph.output_node()
            values = outputs(self.module.root.graph)
            output.args = ((*values[:index], *values[index + 1 :]),)
            for name, other in self.module.states.items():
                self.module.states[name] = other - 1 if other > index else other
            self.module.states[holder.name] = -1  # drop_dead removes it when nothing reads it

    def _set_root_output(self, state_name: str, value: fx.Node) -> None:
        root = self.module.root.graph
        values = outputs(root)
        self.module.states[state_name] = len(values)
        root.output_node().args = ((*values, value),)

    def _bound(self, node: fx.Node) -> list[fx.Node]:
        """Return the outer nodes bound to a placeholder, or [node] itself as a non-weight."""
        if node.op != "placeholder" or not self.region:
            return [node]
        position = placeholders(node.graph).index(node)
        found = [call.args[position] for call in self.module.calls(self.region)]
        return [n for n in found if isinstance(n, fx.Node)] or [node]

    def _fake_build(self, sources: Sequence[fx.Node], build: Callable[..., Any]) -> Tensor:
        with self.module.mode:
            value = build(*(s.meta["val"] for s in sources))
        assert isinstance(value, Tensor)
        return value.contiguous()

    def _placeholder(self, graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
        existing = placeholders(graph)
        first = next(iter(graph.nodes))
        where = graph.inserting_after(existing[-1]) if existing else graph.inserting_before(first)
        with where:
            node = graph.placeholder(name)
        node.target = node.name  # fx prints the target: keep it unique
        node.meta["val"] = value
        return node

    def _bind(self, graph: fx.Graph, name: str, value: Tensor, outer: Sequence[fx.Node]) -> fx.Node:
        node = self._placeholder(graph, name, value)
        for call, argument in zip(self.module.calls(self.region), outer):
            call.args = (*call.args, argument)
        return node


def fake_value(node: fx.Node, module: IRModule) -> Any:
    """Run a node's target on the fake values of its arguments."""
    return value_of(node, module)
