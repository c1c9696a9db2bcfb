"""Write complex arithmetic as real arithmetic on two parts, as rotary embeddings use it.

No kernel computes in complex numbers, and none needs to: a complex value becomes two real ones,
also where it enters a region. Whatever is still complex afterwards is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from aios_compile.ir import provenance
from aios_compile.ir.module import IRModule, Recipe, placeholders

aten = torch.ops.aten
Pair = tuple[Any, Any]
LAYOUTS = (
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.expand.default,
    aten.clone.default,
    aten.alias.default,
    aten.index.Tensor,
    aten.index_select.default,
)
SUMS = (aten.add.Tensor, aten.sub.Tensor)


def split_complex(module: IRModule) -> None:
    """Replace every complex value of a level-1 module by its two parts, where its ops are known."""
    if not any(_is_complex(n) for gm in module.graphs().values() for n in gm.graph.nodes):
        return
    held = {name: _inputs(module, name) for name in module.regions()}
    for name, graph_module in module.graphs().items():
        splitter = _Splitter(module, graph_module.graph, held.get(name, {}))
        for node in list(graph_module.graph.nodes):
            splitter.visit(node)
        for node in [n for n in reversed(graph_module.graph.nodes) if n.op != "output"]:
            if _is_complex(node) and not node.users and node in splitter.pairs:
                graph_module.graph.erase_node(node)
        graph_module.recompile()


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_complex()


def _inputs(module: IRModule, region: str) -> dict[fx.Node, Pair]:
    """Give a region two real inputs for each complex one; its calls pass the value twice."""
    graph = module.graphs()[region].graph
    pairs = {}
    for position in reversed(range(len(placeholders(graph)))):
        node = placeholders(graph)[position]
        if not _is_complex(node):
            continue
        parts = []
        for suffix in ("imag", "real"):  # each is inserted right behind the old input
            with graph.inserting_after(node):
                part = graph.placeholder(f"{node.name}_{suffix}")
            part.target = part.name
            part.meta = dict(node.meta)
            with module.mode:
                part.meta["val"] = node.meta["val"].real.clone()
            parts.append(part)
        pairs[node] = (parts[1], parts[0])
        for call in module.calls(region):
            value = call.args[position]
            call.args = (*call.args[:position], value, value, *call.args[position + 1 :])
    return pairs


def _call(module: IRModule, graph: fx.Graph, target: Any, args: Any, source: fx.Node) -> fx.Node:
    node = graph.call_function(target, tuple(args))
    given = fx.node.map_arg(tuple(args), lambda n: n.meta["val"])
    with module.mode, torch.no_grad():
        node.meta["val"] = target(*given)
    provenance.inherit(node, [source])
    return node


class _Splitter:
    """The two parts of each complex node of one graph."""

    def __init__(self, module: IRModule, graph: fx.Graph, pairs: dict[fx.Node, Pair]) -> None:
        self.module = module
        self.graph = graph
        self.pairs = dict(pairs)
        for node, (real, imaginary) in pairs.items():
            assert not _is_complex(real) and not _is_complex(imaginary), node
        self.source: fx.Node = next(iter(graph.nodes))

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder" and _is_complex(node) and node not in self.pairs:
            self._stored(node)
        self.source = node
        if node.op == "call_module":
            self._pass_parts(node)
        if node.op != "call_function":
            return
        with self.graph.inserting_before(node):
            if _is_complex(node):
                parts = self._parts(node)
                if parts is not None:
                    self.pairs[node] = parts
            elif node.target is aten.view_as_real.default and node.args[0] in self.pairs:
                columns = [
                    self.call(aten.unsqueeze.default, part, -1)
                    for part in self.pairs[node.args[0]]  # type: ignore[index]
                ]
                new = self.call(aten.cat.default, columns, -1)
                node.replace_all_uses_with(new)
                self.graph.erase_node(node)

    def _pass_parts(self, call: fx.Node) -> None:
        """Pass the two parts of a value that stands twice among the arguments of a region."""
        arguments: list[Any] = list(call.args)
        for i, argument in enumerate(arguments):
            if argument in self.pairs and i + 1 < len(arguments):
                arguments[i : i + 2] = self.pairs[argument]
        call.args = tuple(arguments)

    def call(self, target: Any, *args: Any) -> fx.Node:
        return _call(self.module, self.graph, target, args, self.source)

    def _stored(self, node: fx.Node) -> None:
        """Keep a complex constant whose value is known as two real ones."""
        recipe = self.module.weights.get(node.name)
        if recipe is None or not recipe.is_identity() or recipe.names[0] not in self.module.tensors:
            return
        name, parts = recipe.names[0], []
        tensor = self.module.tensors[name].resolve_conj()
        for suffix, value in (("imag", tensor.imag), ("real", tensor.real)):
            value = value.contiguous()
            with self.graph.inserting_after(node):
                part = self.graph.placeholder(f"{node.name}_{suffix}")
            part.target = part.name
            part.meta = dict(node.meta)
            part.meta["val"] = self.module.mode.from_tensor(value, static_shapes=True)
            self.module.weights[part.name] = Recipe.identity(f"{name}.{suffix}")
            self.module.tensors[f"{name}.{suffix}"] = value
            parts.append(part)
        del self.module.weights[node.name]
        self.pairs[node] = (parts[1], parts[0])

    def _parts(self, node: fx.Node) -> Pair | None:
        args: Any = node.args
        if node.target is aten.complex.default:
            return args[0], args[1]
        if node.target is aten.polar.default:
            turned = (self.call(op, args[1]) for op in (aten.cos.default, aten.sin.default))
            real, imaginary = (self.call(aten.mul.Tensor, args[0], t) for t in turned)
            return real, imaginary
        if node.target is aten.view_as_complex.default:
            real, imaginary = (self.call(aten.select.int, args[0], -1, i) for i in (0, 1))
            return real, imaginary
        if node.target is aten.mul.Tensor:
            return self._product(*args)
        if node.target in SUMS and all(a in self.pairs for a in args) and not node.kwargs:
            (a, b), (c, d) = (self.pairs[x] for x in args)
            return self.call(node.target, a, c), self.call(node.target, b, d)
        if not args or args[0] not in self.pairs:
            return None
        real, imaginary = self.pairs[args[0]]
        if node.target in (aten._conj.default, aten.conj_physical.default):
            return real, self.call(aten.neg.default, imaginary)
        if node.target in (aten._to_copy.default, aten.lift_fresh_copy.default):
            return real, imaginary
        if node.target in LAYOUTS:
            return self.call(node.target, real, *args[1:]), self.call(
                node.target, imaginary, *args[1:]
            )
        return None

    def _product(self, left: Any, right: Any) -> Pair | None:
        mul = aten.mul.Tensor
        if left in self.pairs and right in self.pairs:
            (a, b), (c, d) = self.pairs[left], self.pairs[right]
            real = self.call(aten.sub.Tensor, self.call(mul, a, c), self.call(mul, b, d))
            imaginary = self.call(aten.add.Tensor, self.call(mul, a, d), self.call(mul, b, c))
            return real, imaginary
        if left not in self.pairs:
            left, right = right, left
        if left not in self.pairs or _is_complex(right) or isinstance(right, complex):
            return None
        a, b = self.pairs[left]
        return self.call(mul, a, right), self.call(mul, b, right)
