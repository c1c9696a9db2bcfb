"""The program between capture and code generation: one outer graph, its regions, its bindings.

A decoder layer is a *region*: a GraphModule child of `root` that `call_module` nodes call n times
with different weights. A region returns a tuple, read through operator.getitem. At each level the
whole is an ordinary GraphModule that runs in eager PyTorch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from aios_compile.ir.symbols import fake_mode_of


class Level(IntEnum):
    """What a graph may contain; see ir/verifier.py for the rules."""

    CAPTURED = 1
    SEMANTIC = 2
    KERNELS = 3


@dataclass(frozen=True)
class Recipe:
    """How one weight comes from the checkpoint: an FX graph whose placeholders are `names`."""

    graph: fx.Graph
    names: tuple[str, ...]

    @staticmethod
    def identity(name: str) -> Recipe:
        graph = fx.Graph()
        graph.output(graph.placeholder("w0"))
        return Recipe(graph, (name,))

    def is_identity(self) -> bool:
        return len(self.graph.nodes) == 2

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute the weight from checkpoint tensors (or fakes, or proxies of another recipe)."""
        env: dict[fx.Node, Any] = {}
        for node, name in zip(placeholders(self.graph), self.names):
            env[node] = tensors[name]
        for node in self.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            if node.op == "call_function":
                env[node] = node.target(*args, **kwargs)
            elif node.op == "call_method":
                env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        result = env[outputs(self.graph)[0]]
        assert isinstance(result, Tensor)
        return result

    @staticmethod
    def compose(build: Callable[..., Any], sources: Sequence[Recipe]) -> Recipe:
        """Return the recipe of build(*sources); names that repeat are read once."""
        graph, env = fx.Graph(), {}
        names = list(dict.fromkeys(name for source in sources for name in source.names))
        for i, name in enumerate(names):
            env[name] = graph.placeholder(f"w{i}")
        values = []
        for source in sources:
            inner: dict[fx.Node, Any] = {}
            holders = [n for n in source.graph.nodes if n.op == "placeholder"]
            inner.update({h: env[name] for h, name in zip(holders, source.names)})
            values.append(graph.graph_copy(source.graph, inner))
        tracer = fx.proxy.GraphAppendingTracer(graph)
        result = build(*(fx.Proxy(value, tracer) for value in values))  # type: ignore[arg-type]
        graph.output(result.node)
        return Recipe(graph, tuple(names))

    def until(self, node: fx.Node) -> Recipe:
        """Return the recipe of an intermediate value of this one."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        names: list[str] = []
        for name, holder in zip(self.names, placeholders(self.graph)):
            if depends_on(node, holder):
                copies[holder] = graph.placeholder(f"w{len(names)}")
                names.append(name)
        for step in self.graph.nodes:
            if step.op not in ("placeholder", "output") and (
                step is node or depends_on(node, step)
            ):
                copies[step] = graph.node_copy(step, copies.__getitem__)
        graph.output(copies[node])
        return Recipe(graph, tuple(names))

    def text(self) -> str:
        """Return the recipe as one line of Python over checkpoint names."""
        names = dict(zip([n for n in self.graph.nodes if n.op == "placeholder"], self.names))
        texts: dict[fx.Node, str] = {n: f"checkpoint[{name!r}]" for n, name in names.items()}

        def show(value: Any) -> str:
            if isinstance(value, fx.Node):
                return texts[value]
            if isinstance(value, (list, tuple)):
                return "[" + ", ".join(show(v) for v in value) + "]"
            return repr(value)

        for node in self.graph.nodes:
            if node.op in ("call_function", "call_method"):
                name = node.target if node.op == "call_method" else node.target.__name__
                args = [show(a) for a in node.args]
                args += [f"{k}={show(v)}" for k, v in node.kwargs.items()]
                texts[node] = f"{name}({', '.join(args)})"
        return show(self.graph.output_node().args[0])


class LengthLimit(NamedTuple):
    """The most tokens that a sequence may have, and the model's line that says so."""

    num_tokens: int
    source_line: str


@dataclass
class IRModule:
    """One level of the program. `root` owns the regions; the tables bind its placeholders.

    weights: placeholder name -> recipe. inputs: placeholder name -> runtime input name.
    states: placeholder name -> index of the output that is its next value (KV caches).
    outputs: names of the leading outputs, e.g. ("logits",). aliases: checkpoint name -> all names
    of the same tensor (tied weights). tensors: values that are known already (buffers, and
    tensors that the code made while it was traced). not_generatable: why a batch of sequences would
    give wrong logits (tokens mix outside attention, see passes/token_mixing.py), or "".
    length_limit: how long a sequence may be (a table of positions ends), None for any length.
    """

    root: fx.GraphModule
    level: Level
    weights: dict[str, Recipe] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("logits",)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    not_generatable: str = ""
    length_limit: LengthLimit | None = None

    @property
    def mode(self) -> FakeTensorMode:
        return fake_mode_of(self.root.graph)

    def regions(self) -> dict[str, fx.GraphModule]:
        """Return the regions that are called, in call order, by name."""
        found: dict[str, fx.GraphModule] = {}
        for node in self.root.graph.nodes:
            if node.op == "call_module" and is_region_call(self.root, node):
                found[str(node.target)] = body_of(node)
        return found

    def calls(self, region: str) -> list[fx.Node]:
        """Return the calls of a region, in order."""
        return [n for n in self.root.graph.nodes if n.op == "call_module" and n.target == region]

    def graphs(self) -> dict[str, fx.GraphModule]:
        """Return every graph that passes work on: the regions, then the outer graph as ""."""
        return {**self.regions(), "": self.root}

    def nodes(self) -> Iterator[fx.Node]:
        """Go through the nodes of every graph, a kernel's body behind each call of it."""
        for graph_module in self.graphs().values():
            for node in graph_module.graph.nodes:
                yield node
                if is_kernel_call(node):
                    yield from body_of(node).graph.nodes


def depends_on(node: fx.Node, source: fx.Node) -> bool:
    """Return whether a node is `source` or is computed from it."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is source:
            return True
        pending += [n for n in current.all_input_nodes if n not in seen]
        seen.update(current.all_input_nodes)
    return False


def is_region_call(owner: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a call_module node calls a region (and not a kernel body)."""
    if node.op != "call_module":
        return False
    body = owner.get_submodule(str(node.target))
    return isinstance(body, fx.GraphModule) and bool(body.meta.get("aios_region"))


def is_kernel_call(node: fx.Node) -> bool:
    """Return whether a call_module node calls a kernel body."""
    if node.op != "call_module":
        return False
    owner = node.graph.owning_module
    assert owner is not None
    return not is_region_call(owner, node)


def body_of(node: fx.Node) -> fx.GraphModule:
    """Return the GraphModule that a call_module node calls."""
    owner = node.graph.owning_module
    assert owner is not None and node.op == "call_module"
    body = owner.get_submodule(str(node.target))
    assert isinstance(body, fx.GraphModule)
    return body


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def outputs(graph: fx.Graph) -> list[Any]:
    """Return the output values of a graph as a list."""
    result = graph.output_node().args[0]
    return list(result) if isinstance(result, (tuple, list)) else [result]


def drop_dead(module: IRModule) -> None:
    """Remove dead code, and region inputs and outputs that nothing uses, from inside out."""
    module.root.graph.eliminate_dead_code(_is_impure)
    for name, region in module.regions().items():
        _drop_dead_outputs(module, name, region)
        region.graph.eliminate_dead_code(_is_impure)
        _drop_dead_inputs(module, name, region)
    module.root.graph.eliminate_dead_code(_is_impure)
    for node in placeholders(module.root.graph):
        bound = node.name in module.weights or node.name in module.inputs
        if not node.users and (bound or module.states.get(node.name) == -1):
            for table in (module.weights, module.inputs, module.states):
                table.pop(node.name, None)
            module.root.graph.erase_node(node)
    for graph_module in module.graphs().values():
        graph_module.delete_all_unused_submodules()
        graph_module.recompile()


def _is_impure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def _drop_dead_outputs(module: IRModule, name: str, region: fx.GraphModule) -> None:
    used: set[int] = set()
    for call in module.calls(name):
        for user in call.users:
            assert user.target is operator.getitem, "a region's result is read through getitem"
            used.add(int(user.args[1]))  # type: ignore[arg-type]
    kept = sorted(used)
    values = outputs(region.graph)
    if len(kept) == len(values):
        return
    region.graph.output_node().args = (tuple(values[i] for i in kept),)
    for call in module.calls(name):
        call.meta["val"] = tuple(call.meta["val"][i] for i in kept)
        for user in list(call.users):
            user.args = (call, kept.index(int(user.args[1])))  # type: ignore[arg-type]


def _drop_dead_inputs(module: IRModule, name: str, region: fx.GraphModule) -> None:
    inputs = placeholders(region.graph)
    kept = [i for i, node in enumerate(inputs) if node.users]
    if len(kept) == len(inputs):
        return
    for call in module.calls(name):
        call.args = tuple(call.args[i] for i in kept)
    for node in inputs:
        if not node.users:
            region.graph.erase_node(node)
