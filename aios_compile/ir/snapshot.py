"""Copy, restore, count and print a program: what the runner needs to revert and compare passes."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx

from aios_compile.ir.module import IRModule, body_of, is_kernel_call, is_region_call


def take(module: IRModule) -> IRModule:
    """Return an independent copy; tensors, fake tensors and recipes are shared."""
    return IRModule(
        copy.deepcopy(module.root),
        module.level,
        dict(module.weights),
        dict(module.inputs),
        dict(module.states),
        module.outputs,
        dict(module.aliases),
        dict(module.tensors),
        module.not_generatable,
        module.length_limit,
    )


def restore(module: IRModule, saved: IRModule) -> None:
    """Make `module` what `saved` is; `saved` must not be used afterwards."""
    module.root = saved.root
    module.level = saved.level
    module.weights, module.inputs, module.states = saved.weights, saved.inputs, saved.states
    module.outputs, module.aliases, module.tensors = saved.outputs, saved.aliases, saved.tensors
    module.not_generatable, module.length_limit = saved.not_generatable, saved.length_limit


def same(module: IRModule, other: IRModule) -> bool:
    """Return whether two programs spell the same, without spelling out shapes and recipes."""
    return _tables(module) == _tables(other) and _nodes(module) == _nodes(other)


def _tables(module: IRModule) -> tuple[object, ...]:
    weights = {name: id(recipe) for name, recipe in module.weights.items()}
    tables = weights, module.inputs, module.states, module.outputs, module.aliases
    return *tables, module.not_generatable, module.length_limit


def _nodes(module: IRModule) -> list[tuple[object, ...]]:
    return [(n.name, n.op, n.target, str(n.args), str(n.kwargs)) for n in module.nodes()]


def target_name(node: fx.Node) -> str:
    """Return a short name of what a node computes: "aten.mul.Tensor", "kernel rms_norm"."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        assert owner is not None
        if is_region_call(owner, node):
            return f"region {node.target}"
        return f"kernel {body_of(node).meta.get('kernel', node.target)}"
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target)


def count_ops(module: IRModule) -> Counter[str]:
    """Count the ops of all graphs by name, each region once."""
    counts: Counter[str] = Counter()
    for graph_module in module.graphs().values():
        for node in graph_module.graph.nodes:
            if node.op in ("call_function", "call_module", "call_method"):
                counts[target_name(node)] += 1
    return counts


def count_nodes(module: IRModule) -> int:
    """Count the nodes of all graphs without placeholders and outputs, each region once."""
    return sum(count_ops(module).values())


def shape_text(value: Any) -> str:
    """Return "f32[s72, 64]" for a (fake) tensor, a tuple of them for a tuple."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(s) for s in value.shape)
        return f"{dtype_text(value.dtype)}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(shape_text(v) for v in value)})"
    return str(value)


_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "e4m3",
    torch.bool: "b8",
}


def dtype_text(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def graph_text(graph_module: fx.GraphModule) -> str:
    """Spell out a graph and the kernel bodies that it calls; equal texts compute the same."""
    lines = []
    for node in graph_module.graph.nodes:
        head = f"{node.name} = {node.op} {node.target} {node.args} {node.kwargs}"
        lines.append(f"{head} : {shape_text(node.meta.get('val'))}")
        if is_kernel_call(node):
            body = graph_text(body_of(node))
            lines.extend("    " + line for line in body.splitlines())
    return "\n".join(lines)


def module_text(module: IRModule) -> str:
    """Spell out the whole program: graphs and tables, without the values of weights."""
    parts = [f"level {int(module.level)}", f"outputs {module.outputs}"]
    parts += [f"graph {name or 'root'}\n{graph_text(g)}" for name, g in module.graphs().items()]
    parts += [f"weight {name} = {recipe.text()}" for name, recipe in module.weights.items()]
    parts += [f"input {name} = {value}" for name, value in module.inputs.items()]
    parts += [f"state {name} -> {index}" for name, index in module.states.items()]
    return "\n".join(parts) + "\n"
