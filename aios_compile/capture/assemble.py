"""Turn a lowered dynamo graph into an IRModule: regions as call_module nodes, inputs by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from aios_compile.capture import torch_private
from aios_compile.capture.complex_numbers import split_complex
from aios_compile.errors import CaptureError
from aios_compile.ir import provenance
from aios_compile.ir.module import (
    IRModule,
    Level,
    Recipe,
    body_of,
    drop_dead,
    outputs,
    placeholders,
)

aten = torch.ops.aten
BATCHED = "aios_batched"  # root.meta: the model's own code takes [1, T]
LAST_ONLY = "aios_last_only"  # root.meta: the model's own code gives the last token's logits
NO_LINE = 'File "<prompt>", line 0, in forward\n    code that is in no file\n'
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def assemble(
    traced: fx.GraphModule,
    lowered: fx.GraphModule,
    bindings: list[Any],
    layer_paths: list[str],
    has_lines: bool = True,
) -> IRModule:
    """Return level 1. `bindings[i]` says what captured input i is (see capture._binding).

    has_lines: every line of the model is in a file, so that no node may have lost its own;
    otherwise nodes without one get NO_LINE.
    """
    root = torch_private.lazy_graph_module(lowered, lowered.graph)
    module = IRModule(root, Level.CAPTURED)
    _own_regions(module, traced)
    _bind_inputs(module, bindings)
    _flatten_tokens(module)
    split_complex(module)
    for graph_module in module.graphs().values():
        _free_of_sizes(graph_module)
    _drop_size_inputs(module)
    drop_dead(module)
    _name_region_inputs(module, layer_paths)
    _check_provenance(module, has_lines)
    return module


def _own_regions(module: IRModule, traced: fx.GraphModule) -> None:
    """Replace invoke_subgraph by call_module of `layer` (or layer_0, layer_1 for several kinds)."""
    graph = module.root.graph
    calls = [n for n in graph.nodes if n.target is torch_private.INVOKE_SUBGRAPH]
    identifiers = list(dict.fromkeys(str(c.args[1]) for c in calls))
    names = {
        k: "layer" if len(identifiers) == 1 else f"layer_{i}" for i, k in enumerate(identifiers)
    }
    for call in calls:
        holder, identifier = call.args[0], str(call.args[1])
        assert isinstance(holder, fx.Node)
        name = names[identifier]
        if name not in dict(module.root.named_children()):
            body = copy.deepcopy(module.root.get_submodule(str(holder.target)))
            assert isinstance(body, fx.GraphModule)
            region = torch_private.lazy_graph_module(body, body.graph)
            region.meta["aios_region"] = True
            _name_from_trace(region, traced, identifier)
            module.root.add_submodule(name, region)
        with graph.inserting_before(call):
            new = graph.call_module(name, tuple(call.args[2:]))
        new.meta = dict(call.meta)
        new.meta["val"] = tuple(n.meta["val"] for n in outputs(body_of(new).graph))
        call.replace_all_uses_with(new)
        graph.erase_node(call)
    graph.eliminate_dead_code()


def _name_from_trace(region: fx.GraphModule, traced: fx.GraphModule, identifier: str) -> None:
    """Give region inputs the names that dynamo took from the model's code (x, cos, sin)."""
    source = getattr(traced, identifier, None)
    if not isinstance(source, fx.GraphModule):
        return
    given = placeholders(source.graph)
    for node, named in zip(placeholders(region.graph), given):
        if not named.name.startswith("l_self"):
            _rename(node, re.sub(r"^l_|_$", "", named.name))


def _rename(node: fx.Node, name: str) -> None:
    node._rename(name) if hasattr(node, "_rename") else setattr(node, "name", name)
    node.target = node.name


def _bind_inputs(module: IRModule, bindings: list[Any]) -> None:
    for node, binding in zip(placeholders(module.root.graph), bindings):
        kind = binding[0]
        if kind == "size":
            node.meta["aios_size"] = binding[1]
        elif kind == "input":
            _rename(node, binding[1])
            module.inputs[node.name] = binding[1]
        elif kind == "weight":
            names, tensor = binding[1], binding[2]
            _rename(node, names[0].replace(".", "_"))
            module.weights[node.name] = Recipe.identity(names[0])
            module.aliases[names[0]] = names
            if not isinstance(tensor, torch.nn.Parameter):  # a buffer: no checkpoint has it
                module.tensors[names[0]] = tensor
        else:
            name, tensor = f"constant.{binding[1]}", binding[2]
            _rename(node, name.replace(".", "_"))
            module.weights[node.name] = Recipe.identity(name)
            module.tensors[name] = tensor
    for node in list(module.root.graph.find_nodes(op="get_attr")):
        _constant_to_weight(module, node)
    for name, region in module.regions().items():
        for node in list(region.graph.find_nodes(op="get_attr")):
            _region_constant_to_weight(module, name, node)


def _flatten_tokens(module: IRModule) -> None:
    """Take and give [T, ...] where the model's code has [1, T, ...]: a step is one flat batch."""
    graph = module.root.graph
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in placeholders(graph):
        value = node.meta["val"]
        if node.name not in module.inputs or value.dim() == 1:
            continue
        users = list(node.users)
        with graph.inserting_before(first):
            batched = graph.call_function(aten.unsqueeze.default, (node, 0))
        batched.meta["val"] = value
        provenance.inherit(batched, users)
        for user in users:
            user.replace_input_with(node, batched)
        with module.mode:
            node.meta["val"] = value.new_empty(value.shape[1:])
        module.root.meta[BATCHED] = True
    output = graph.output_node()
    logits = outputs(graph)[0]
    value = logits.meta["val"]
    if value.dim() == 3 and value.shape[0] == 1:
        with graph.inserting_before(output):
            flat = graph.call_function(aten.squeeze.dim, (logits, 0))
        with module.mode:
            flat.meta["val"] = value[0]
        provenance.inherit(flat, [logits])
        output.args = ((flat,),)


def _constant_to_weight(module: IRModule, node: fx.Node) -> None:
    """Turn a tensor that the trace lifted into an attribute into a weight with a known value."""
    value = getattr(module.root, str(node.target), None)
    if not isinstance(value, torch.Tensor):
        return
    node.replace_all_uses_with(_constant(module, f"constant.{node.target}", value, node))
    module.root.graph.erase_node(node)


def _region_constant_to_weight(module: IRModule, region: str, node: fx.Node) -> None:
    """Do the same inside a region: an input of it, bound to one weight in every call."""
    value = getattr(module.root.get_submodule(region), str(node.target), None)
    if not isinstance(value, torch.Tensor):
        return
    outer = _constant(module, f"constant.{region}.{node.target}", value, node)
    first = next(n for n in node.graph.nodes if n.op != "placeholder")
    with node.graph.inserting_before(first):
        inner = node.graph.placeholder(outer.name)
    inner.target = inner.name
    inner.meta = dict(outer.meta)
    for call in module.calls(region):
        call.args = (*call.args, outer)
    node.replace_all_uses_with(inner)
    node.graph.erase_node(node)


def _constant(module: IRModule, name: str, value: torch.Tensor, node: fx.Node) -> fx.Node:
    with module.root.graph.inserting_before(next(iter(module.root.graph.nodes))):
        holder = module.root.graph.placeholder(name.replace(".", "_"))
    holder.target = holder.name
    holder.meta = dict(node.meta)
    holder.meta["val"] = as_packed(module.mode.from_tensor(value, static_shapes=True))
    module.weights[holder.name] = Recipe.identity(name)
    module.tensors[name] = value
    return holder


def as_packed(fake: Any) -> Any:
    """Return a fake weight as packing leaves it: without gaps, and from its memory's begin.

    A module may hold a weight transposed, or as a part of a larger buffer.
    """
    if not isinstance(fake, torch.Tensor) or (fake.is_contiguous() and not fake.storage_offset()):
        return fake
    return fake.clone(memory_format=torch.contiguous_format)


def _free_of_sizes(graph_module: fx.GraphModule) -> None:
    """Write T in shapes as -1 where one dimension is symbolic: shapes then need no size input."""
    for node in graph_module.graph.nodes:
        if node.target in RESHAPES:
            shape = list(node.args[1])
            symbolic = [i for i, s in enumerate(shape) if not isinstance(s, int)]
            if len(symbolic) == 1 and -1 not in shape:
                shape[symbolic[0]] = -1
                node.args = (node.args[0], shape)
        elif node.target is aten.expand.default:
            shape = list(node.args[1])
            source = node.args[0].meta["val"].shape
            for i, size in enumerate(shape):
                own = i - len(shape) + len(source)
                if not isinstance(size, int) and own >= 0 and not isinstance(source[own], int):
                    shape[i] = -1
            node.args = (node.args[0], shape)


def _drop_size_inputs(module: IRModule) -> None:
    """Replace size placeholders by aten.sym_size of a tensor input."""
    for name, graph_module in module.graphs().items():
        graph = graph_module.graph
        inputs = placeholders(graph)
        for node in inputs:
            if isinstance(node.meta["val"], torch.Tensor):
                continue
            if node.users:
                _size_from_tensor(graph, node, inputs)
            position = inputs.index(node)
            if name:
                for call in module.calls(name):
                    call.args = tuple(a for i, a in enumerate(call.args) if i != position)
            graph.erase_node(node)
            inputs = placeholders(graph)


def _size_from_tensor(graph: fx.Graph, node: fx.Node, inputs: Sequence[fx.Node]) -> None:
    expr = node.meta["val"].node.expr
    for tensor in inputs:
        value = tensor.meta["val"]
        if not isinstance(value, torch.Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if not isinstance(size, int) and size.node.expr == expr:
                with graph.inserting_after(inputs[-1]):
                    new = graph.call_function(aten.sym_size.int, (tensor, dim))
                new.meta["val"] = node.meta["val"]
                provenance.inherit(new, list(node.users))
                node.replace_all_uses_with(new, lambda user: user.op != "call_module")
                return
    raise AssertionError(f"no tensor input carries the size {expr}")


def _name_region_inputs(module: IRModule, layer_paths: list[str]) -> None:
    """Name region inputs after the weight of the first call, without the layer's path."""
    prefixes = tuple(re.escape(path) for path in layer_paths)
    pattern = re.compile(rf"^(?:model\.)?(?:{'|'.join(prefixes)})\.\d+\.") if prefixes else None
    for name, region in module.regions().items():
        call = module.calls(name)[0]
        for node, argument in zip(placeholders(region.graph), call.args):
            if isinstance(argument, fx.Node) and argument.name in module.weights:
                full = module.weights[argument.name].names[0]
                _rename(node, (pattern.sub("", full) if pattern else full).replace(".", "_"))
        region.recompile()
    module.root.recompile()


def _check_provenance(module: IRModule, has_lines: bool) -> None:
    for graph_module in module.graphs().values():
        for node in graph_module.graph.nodes:
            namespace = getattr(node.target, "namespace", "aten")
            if namespace not in ("aten", "aios", "prims"):
                raise CaptureError(
                    f"the model calls {node.target}, an operator outside of PyTorch's core",
                    source_line=provenance.source_line(node) or None,
                )
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise CaptureError(
                    "the model draws random numbers",
                    source_line=provenance.source_line(node) or None,
                    advice="F.dropout needs training=self.training",
                )
            _check_value(node)
            if node.target is aten._local_scalar_dense.default:
                raise CaptureError(
                    "a value of a tensor becomes a Python number",
                    source_line=provenance.source_line(node) or None,
                    advice="data-dependent Python (.item()) must become tensor code",
                )
            traced = node.op == "call_function" and "getitem" not in str(node.target)
            if traced and not has_lines:
                node.meta["stack_trace"] = node.meta.get("stack_trace") or NO_LINE
            if traced and node.target is not aten.sym_size.int and not node.meta.get("stack_trace"):
                raise CaptureError(f"node {node.name} ({node.target}) lost the model's source line")


def _check_value(node: fx.Node) -> None:
    """Refuse numbers and sizes that nothing later knows, where the model's line is at hand."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return
    line = provenance.source_line(node) or None
    if value.is_complex():
        raise CaptureError(f"the model computes with {value.dtype}", source_line=line)
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            expr = size.node.expr
            if not expr.is_polynomial(*expr.free_symbols):
                raise CaptureError(
                    f"a tensor has the size {expr}, expected sums and products of the token count",
                    source_line=line,
                )
