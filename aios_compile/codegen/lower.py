"""Lower level 3 to a Program: kernels, phases, buffers, argument tables.

One function a graph. A region's scratch offsets are local to it; what differs from call to call
(x, weights, KV) is a row of its argument table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from aios_compile.codegen.emit_kernels import Emitted, tensor_arguments
from aios_compile.codegen.form_phases import form_phases
from aios_compile.codegen.layout import (
    Base,
    base_of,
    compute_nodes,
    num_bytes,
    result_base,
    shift_bytes,
)
from aios_compile.codegen.operand import BYTES, DTYPE_NAMES, Operand, dim_of, dim_value
from aios_compile.codegen.program import (
    BufferRow,
    Function,
    Kernel,
    Launch,
    MemoryPlan,
    Program,
    Ref,
    RegionCall,
    StateEntry,
    TensorEntry,
    WeightEntry,
)
from aios_compile.errors import CodegenError
from aios_compile.ir.lifetimes import Lifetime, Placement
from aios_compile.ir.module import (
    IRModule,
    Recipe,
    body_of,
    is_region_call,
    outputs,
    placeholders,
)

Planner = Callable[[Sequence[Lifetime]], Placement]


@dataclass
class _Graph:
    """One graph while it is lowered. `arguments`: (input name, packing) -> argument index."""

    name: str
    nodes: list[fx.Node]
    phases: dict[fx.Node, int]
    arguments: dict[tuple[str, str], int] = field(default_factory=dict)
    results: dict[Base, int] = field(default_factory=dict)
    aliases: dict[Base, Base] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    scratch_bytes: int = 0


class Lowering:
    """Lower one module. Owns the tables; `program()` is the whole of it, in order."""

    def __init__(
        self, module: IRModule, emitted: Emitted, sizes: Mapping[str, int], planner: Planner
    ) -> None:
        self.plan_memory = planner
        self.module = module
        self.emitted = emitted
        self.sizes = dict(sizes)
        self.overlap = 0  # phases after its last that a buffer of a region is kept
        self.weights: dict[tuple[str, str], int] = {}
        self.inputs = {name: i for i, name in enumerate(module.inputs)}
        self.states = {name: i for i, name in enumerate(module.states)}
        self.rows: list[BufferRow] = []
        self.scratch: dict[str, int] = {}

    def program(self, settings: Mapping[str, Any]) -> Program:
        self.overlap = 1 if settings.get("persistent_decode") else 0  # triton/handover.py
        regions = {name: self._phased(name, gm) for name, gm in self.module.regions().items()}
        for graph in regions.values():
            self._declare_arguments(graph)
            self._plan_region(graph)
        root = self._phased("", self.module.root)
        placement = self._plan_root(root, regions)
        functions = [self._region_function(graph, root) for graph in regions.values()]
        functions.append(Function("step", self._items(root, regions)))
        return Program(
            kernels=tuple(
                Kernel(s.name, s.symbol, s.digest(), s.model_lines, s.candidates)
                for s in self.emitted.sources
            ),
            functions=tuple(functions),
            weights=tuple(self._weight_entry(*key) for key in self.weights),
            inputs=tuple(self._tensor_entry(name) for name in self.module.inputs),
            outputs=tuple(self._outputs(root)),
            states=tuple(self._state_entry(name) for name in self.module.states),
            plan=placement,
            sizes=self.sizes,
            num_launches=sum(self._launches(n, regions) for n in root.nodes),
            settings=dict(settings),
            counters=max((s.counters for s in self.emitted.sources), default=0),
        )

    def _phased(self, name: str, graph_module: fx.GraphModule) -> _Graph:
        nodes = compute_nodes(graph_module.graph)
        makers: dict[Base, fx.Node] = {}
        dependencies: dict[fx.Node, list[fx.Node]] = {}
        alone = [n for n in nodes if is_region_call(graph_module, n)]
        for node in nodes:
            bases = {base_of(a) for a in tensor_arguments(node)}
            dependencies[node] = [makers[b] for b in bases if b in makers]
            for i in range(_num_results(node)):
                makers[result_base(node, i)] = node
        return _Graph(name, nodes, form_phases(nodes, dependencies, alone))

    def _declare_arguments(self, graph: _Graph) -> None:
        """Number the inputs that kernels read (each packing apart), then the results."""
        for node in graph.nodes:
            for i, argument in enumerate(tensor_arguments(node)):
                base = base_of(argument)
                if base.node.op == "placeholder":
                    key = (base.node.name, self.emitted.packed.get((node, i), ""))
                    graph.arguments.setdefault(key, len(graph.arguments))
        for value in outputs(self.module.regions()[graph.name].graph):
            base = base_of(value)
            if base.node.op != "placeholder" and base not in graph.results:
                graph.results[base] = len(graph.arguments) + len(graph.results)

    def _plan_region(self, graph: _Graph) -> None:
        lifetimes = [
            replace(item, last=item.last + self.overlap)
            for item in self._lifetimes(graph)
            if item.name not in _names(graph.results)
        ]
        placement = self.plan_memory(lifetimes)
        graph.offsets, graph.scratch_bytes = placement.offsets, placement.arena_bytes
        self._note(graph.name, lifetimes, placement.offsets)

    def _plan_root(self, root: _Graph, regions: Mapping[str, _Graph]) -> MemoryPlan:
        last = max(root.phases.values(), default=0) + 1
        kept = {base_of(v) for v in outputs(self.module.root.graph)}
        lifetimes = self._lifetimes(root, kept, last)
        for name, graph in regions.items():
            phases = [root.phases[n] for n in self.module.calls(name)]
            if graph.scratch_bytes:
                span = (min(phases), max(phases))
                lifetimes.append(Lifetime(f"{name}.scratch", graph.scratch_bytes, *span))
        placement = self.plan_memory(lifetimes)
        root.offsets = placement.offsets
        self.scratch = {name: placement.offsets.get(f"{name}.scratch", 0) for name in regions}
        self._note("", lifetimes, placement.offsets)
        naive = placement.naive_bytes + sum(
            row.bytes * len(self.module.calls(row.name.split("/")[0]))
            for row in self.rows
            if "/" in row.name
        )
        naive -= sum(graph.scratch_bytes for graph in regions.values())
        return MemoryPlan(
            placement.arena_bytes, naive, placement.lower_bound_bytes, tuple(self.rows)
        )

    def _lifetimes(
        self, graph: _Graph, kept: set[Base] | None = None, end: int = 0
    ) -> list[Lifetime]:
        """Return the lifetimes of the buffers that this graph's kernels and calls make."""
        spans: dict[Base, list[int]] = {}
        for node in graph.nodes:
            phase = graph.phases[node]
            for i in range(_num_results(node)):
                base = result_base(node, i)
                if base.node is node:
                    spans.setdefault(base, [phase, phase])
            for argument in tensor_arguments(node):
                base = base_of(argument)
                if base in spans:
                    spans[base][1] = max(spans[base][1], phase)
        for base in kept or ():
            if base in spans:
                spans[base][1] = end
        self._share_in_place(graph, spans)
        lifetimes = [
            Lifetime(base.name, num_bytes(base.value, self.sizes), *span)
            for base, span in spans.items()
        ]
        for node in graph.nodes:
            for name, space in self._workspace(node):
                size = math.prod(dim_value(d, self.sizes) for d in space.shape)
                phase = graph.phases[node]
                lifetimes.append(Lifetime(name, size * BYTES[space.dtype], phase, phase))
        return lifetimes

    def _workspace(self, node: fx.Node) -> list[tuple[str, Operand]]:
        """Return the buffers that a kernel call needs besides its operands, by name."""
        if node not in self.emitted.by_call:
            return []
        source = self.emitted.sources[self.emitted.by_call[node]]
        return [(f"{node.name}.{space.name}", space) for space in source.workspace]

    def _share_in_place(self, graph: _Graph, spans: dict[Base, list[int]]) -> None:
        """Give a kernel's result the buffer of an operand that dies there, where it may."""
        for node in graph.nodes:
            if node not in self.emitted.by_call:
                continue
            source = self.emitted.sources[self.emitted.by_call[node]]
            arguments = tensor_arguments(node)
            for result, operand in source.inplace:
                new, old = result_base(node, result), base_of(arguments[operand])
                old = graph.aliases.get(old, old)
                if new not in spans or old not in spans or new in graph.results:
                    continue
                if self._may_share(graph, node, arguments[operand], new, old, spans):
                    graph.aliases[new] = old
                    spans[old][1] = max(spans[old][1], spans.pop(new)[1])

    def _may_share(
        self, graph: _Graph, node: fx.Node, argument: fx.Node, new: Base, old: Base, spans: Any
    ) -> bool:
        phase = graph.phases[node]
        readers = [
            n
            for n in graph.nodes
            if n is not node and graph.phases[n] >= phase
            for a in tensor_arguments(n)
            if graph.aliases.get(base_of(a), base_of(a)) == old
        ]
        own = [
            a for a in tensor_arguments(node) if graph.aliases.get(base_of(a), base_of(a)) == old
        ]
        same = num_bytes(new.value, self.sizes) == num_bytes(old.value, self.sizes)
        same = same and new.value.dtype == old.value.dtype
        whole = shift_bytes(argument) == 0 and spans[old][1] == phase
        return same and whole and not readers and len(own) == 1 and old not in graph.results

    def _note(self, region: str, lifetimes: list[Lifetime], offsets: Mapping[str, int]) -> None:
        prefix = f"{region}/" if region else ""
        for item in lifetimes:
            self.rows.append(
                BufferRow(prefix + item.name, item.bytes, offsets[item.name], item.first, item.last)
            )

    def _ref(self, graph: _Graph, value: fx.Node, packing: str) -> Ref:
        """Return the address of a value inside the function of its graph."""
        base, shift = base_of(value), shift_bytes(value)
        if base.node.op == "placeholder":
            return self._placeholder_ref(graph, base.node.name, packing, shift)
        return self._buffer_ref(graph, base, shift)

    def _buffer_ref(self, graph: _Graph, base: Base, shift: Any = 0) -> Ref:
        base = graph.aliases.get(base, base)
        if base in graph.results:
            return Ref("argument", graph.results[base], shift)
        return self._arena_ref(graph, base.name, shift)

    def _arena_ref(self, graph: _Graph, name: str, shift: Any = 0) -> Ref:
        offset = graph.offsets[name] + (self.scratch[graph.name] if graph.name else 0)
        return Ref("arena", offset, shift)

    def _placeholder_ref(self, graph: _Graph, name: str, packing: str, shift: Any) -> Ref:
        if graph.name:
            return Ref("argument", graph.arguments[name, packing], shift)
        if name in self.module.weights:
            index = self.weights.setdefault((name, packing), len(self.weights))
            return Ref("weight", index, shift)
        if name in self.states:
            return Ref("state", self.states[name], shift)
        return Ref("input", self.inputs[name], shift)

    def _region_function(self, graph: _Graph, root: _Graph) -> Function:
        rows = [self._row(graph, call, root) for call in self.module.calls(graph.name)]
        return Function(graph.name, self._items(graph, {}), tuple(rows))

    def _row(self, graph: _Graph, call: fx.Node, root: _Graph) -> tuple[Ref, ...]:
        """Return the argument row of one call: inputs in order of use, then results."""
        names = [n.name for n in placeholders(body_of(call).graph)]
        row = []
        for name, packing in graph.arguments:
            value = call.args[names.index(name)]
            assert isinstance(value, fx.Node)
            ref = self._ref(root, value, packing)
            if not isinstance(ref.shift, int):
                raise CodegenError(f"region argument {name} begins at a place that depends on T")
            row.append(ref)
        for base in graph.results:
            values = [base_of(v) for v in outputs(body_of(call).graph)]
            row.append(self._buffer_ref(root, Base(call, values.index(base))))
        return tuple(row)

    def _items(self, graph: _Graph, regions: Mapping[str, _Graph]) -> tuple[Any, ...]:
        items: list[Launch | RegionCall] = []
        for node in sorted(graph.nodes, key=graph.phases.__getitem__):
            phase = graph.phases[node]
            name = str(node.target)
            if name not in regions:
                items.append(self._launch(graph, node, phase))
                continue
            row = self.module.calls(name).index(node)
            last = items[-1] if items else None
            if isinstance(last, RegionCall) and (last.region, last.first + last.count) == (
                name,
                row,
            ):
                items[-1] = RegionCall(name, last.first, last.count + 1, last.phase)
            else:
                items.append(RegionCall(name, row, 1, phase))
        return tuple(items)

    def _launch(self, graph: _Graph, node: fx.Node, phase: int) -> Launch:
        arguments = tensor_arguments(node)
        refs = [
            self._ref(graph, a, self.emitted.packed.get((node, i), ""))
            for i, a in enumerate(arguments)
        ]
        for i in range(_num_results(node)):
            base = result_base(node, i)
            if base.node is node:
                refs.append(self._buffer_ref(graph, base))
            else:  # written in place: the result is the operand
                refs.append(self._ref(graph, node.args[node.meta["written_in_place"][i]], ""))
        refs += [self._arena_ref(graph, name) for name, _ in self._workspace(node)]
        if self.emitted.sources[self.emitted.by_call[node]].counters:
            refs.append(Ref("counters", 0))
        return Launch(self.emitted.by_call[node], tuple(refs), phase, str(node.target))

    def _launches(self, node: fx.Node, regions: Mapping[str, _Graph]) -> int:
        graph = regions.get(str(node.target))
        return len(graph.nodes) if graph else 1

    def _weight_entry(self, name: str, packing: str) -> WeightEntry:
        value = self._value(name)
        recipe: Recipe = self.module.weights[name]
        label = f"{name}.{packing}" if packing else name
        dtype = str(value.dtype).removeprefix("torch.")
        return WeightEntry(label, dtype, tuple(map(int, value.shape)), packing, recipe.text())

    def _tensor_entry(self, name: str) -> TensorEntry:
        value = self._value(name)
        shape = tuple(dim_of(s) for s in value.shape)
        return TensorEntry(self.module.inputs[name], DTYPE_NAMES[str(value.dtype)], shape)

    def _state_entry(self, name: str) -> StateEntry:
        value = self._value(name)
        shape = tuple(int(s) for s in value.shape[1:])
        return StateEntry(name, DTYPE_NAMES[str(value.dtype)], shape)

    def _value(self, name: str) -> Any:
        return next(n for n in placeholders(self.module.root.graph) if n.name == name).meta["val"]

    def _outputs(self, root: _Graph) -> list[TensorEntry]:
        entries = []
        for name, value in zip(self.module.outputs, outputs(self.module.root.graph)):
            ref = self._ref(root, value, "")
            if ref.space != "arena" or not isinstance(ref.shift, int):
                raise CodegenError(f"output {name} is not a kernel's result (it is {ref.space})")
            fake = value.meta["val"]
            shape = tuple(dim_of(s) for s in fake.shape)
            dtype = DTYPE_NAMES[str(fake.dtype)]
            entries.append(TensorEntry(name, dtype, shape, ref.index + ref.shift))
        return entries


def _num_results(node: fx.Node) -> int:
    value = node.meta["val"]
    return len(value) if isinstance(value, (tuple, list)) else 1


def _names(bases: Mapping[Base, int]) -> set[str]:
    return {base.name for base in bases}


def lower(
    module: IRModule,
    emitted: Emitted,
    sizes: Mapping[str, int],
    settings: Mapping[str, Any],
    planner: Planner,
) -> Program:
    """Return the program of a level-3 module for the given largest sizes (T, S, R).

    `planner` is passes.plan_memory: codegen does not import passes.
    """
    return Lowering(module, emitted, sizes, planner).program(settings)
