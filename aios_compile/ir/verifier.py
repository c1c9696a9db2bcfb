"""Check that a program is what its level promises. Raises PassError naming the node.

While a stage of passes runs, a graph holds ops of its own level and of the next one. So each level
allows what the next one allows, and forbids what must be gone by then. Rules: known ops; a fake
value and a model line on every node; calls that fit what they call; effects of the KV caches; at
level 3 only kernel calls and views, and no [*, T, T] tensor unless the program is call-only (keeps
no cache).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from aios_compile.errors import PassError
from aios_compile.ir import ops, provenance
from aios_compile.ir.module import (
    IRModule,
    Level,
    body_of,
    is_kernel_call,
    is_region_call,
    outputs,
    placeholders,
)

aten = torch.ops.aten
assert ops.TABLE, "the op table registers the aios operators"
aios = torch.ops.aios
VIEW_NAMES = frozenset(
    [
        "view",
        "permute",
        "t",
        "transpose",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "split",
        "split_with_sizes",
        "alias",
    ]
)
WRITTEN = {  # argument of a write -> its result
    aios.kv_write.default: {2: 0, 3: 1},
    aios.quantized_kv_write.default: {2: 0, 3: 1, 4: 2, 5: 3},
}


def verify(module: IRModule) -> None:
    """Check the whole program against the rules of `module.level`."""
    for name, graph_module in module.graphs().items():
        _check_graph(module, name, graph_module)
    _check_tables(module)
    for name, index in module.states.items():
        _check_state(module, name, index)


def fail(what: str, node: fx.Node, region: str = "") -> PassError:
    where = f" in region {region}" if region else ""
    return PassError(
        f"{node.name}{where}: {what}", source_line=provenance.source_line(node) or None
    )


def _check_graph(module: IRModule, region: str, graph_module: fx.GraphModule) -> None:
    if not isinstance(graph_module.graph.output_node().args[0], tuple):
        raise fail("a graph returns a tuple", graph_module.graph.output_node(), region)
    for node in graph_module.graph.nodes:
        if node.op == "output":
            continue
        if "val" not in node.meta:
            raise fail("has no fake value", node, region)
        if node.op == "call_function":
            _check_function(module.level, node, region)
        elif node.op == "call_module":
            _check_call(module, graph_module, node, region)
        elif node.op != "placeholder":
            raise fail(f"{node.op} is not allowed in a program", node, region)
        if module.level is Level.KERNELS and module.states and not module.not_generatable:
            _check_size(module, node, region)


def _is_plumbing(node: fx.Node) -> bool:
    """Return whether a node only picks a result or computes with sizes."""
    if node.target is operator.getitem or node.target is aten.sym_size.int:
        return True
    return not isinstance(node.meta["val"], (torch.Tensor, tuple, list))


def _check_function(level: Level, node: fx.Node, region: str) -> None:
    if _is_plumbing(node):
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        raise fail(f"{node.target} is not an operator", node, region)
    if not provenance.source_lines(node):
        raise fail(f"{node.target} lost the model's source line", node, region)
    namespace, name = str(node.target).split(".")[:2]
    if namespace not in ("aten", "aios", "prims"):
        raise fail(f"{node.target} is neither an aten nor an aios operator", node, region)
    if node.target is aios.bf16_linear.default:
        weight: Any = node.args[1]
        if weight.meta["val"].dtype is not torch.bfloat16:
            given = _description(weight.meta["val"], False)
            raise fail(f"rounds activations for a weight of {given}, not of bf16", node, region)
    if level >= Level.SEMANTIC and node.target is aios.sdpa.default:
        raise fail(
            "attention was not recognised and stays scaled_dot_product_attention", node, region
        )
    if level is Level.KERNELS and (namespace, name) not in {("aten", n) for n in VIEW_NAMES}:
        raise fail(f"{node.target} is neither a kernel call nor a view", node, region)


def _check_call(module: IRModule, owner: fx.GraphModule, node: fx.Node, region: str) -> None:
    """Check a region or kernel call: arguments and results as the callee declares them."""
    kernel = is_kernel_call(node)
    if kernel and module.level is Level.CAPTURED:
        raise fail("a kernel call in a captured graph", node, region)
    if is_region_call(owner, node) and region:
        raise fail("a region called from a region", node, region)
    body = body_of(node)
    wanted = placeholders(body.graph)
    if len(wanted) != len(node.args) or node.kwargs:
        raise fail(f"passes {len(node.args)} arguments, expected {len(wanted)}", node, region)
    strides = module.level is Level.KERNELS
    for holder, argument in zip(wanted, node.args):
        if not isinstance(argument, fx.Node):
            raise fail(f"argument {holder.name} is not a node", node, region)
        _compare(argument.meta["val"], holder.meta["val"], f"argument {holder.name}", node, strides)
    results = outputs(body.graph)
    given = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
    if len(results) != len(given):
        raise fail(f"has {len(given)} results, its body {len(results)}", node, region)
    for i, (value, result) in enumerate(zip(given, results)):
        _compare(value, result.meta["val"], f"result {i}", node, strides)
    if kernel:
        _check_body(node, body, region)


def _check_body(call: fx.Node, body: fx.GraphModule, region: str) -> None:
    if not call.meta.get("kernel") or not provenance.source_lines(call):
        raise fail("a kernel call without its kind or its model line", call, region)
    for node in body.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise fail(f"the body of {call.target} holds a {node.op}", node, region)
    for result in outputs(body.graph):
        if result.op != "call_function":
            raise fail(f"the body of {call.target} returns its input {result.name}", call, region)


def _compare(value: Any, wanted: Any, what: str, node: fx.Node, strides: bool) -> None:
    given, expected = _description(value, strides), _description(wanted, strides)
    if given != expected:
        raise fail(f"{what} is {given}, expected {expected}", node)


def _description(value: Any, strides: bool) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    sizes = [str(s) for s in value.shape]
    text = f"{str(value.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"
    if strides:
        kept = [str(t) for s, t in zip(value.shape, value.stride()) if not _is_one(s)]
        text += f" with strides ({', '.join(kept)})"
    return text


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _check_size(module: IRModule, node: fx.Node, region: str) -> None:
    """Refuse a tensor that grows with the square of the token count."""
    env = getattr(module.mode.shape_env, "aios_sizes", {})
    tokens = env["T"].node.expr if "T" in env else None
    values = (
        node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
    )
    for value in values:
        if not isinstance(value, torch.Tensor) or tokens is None:
            continue
        sizes = [
            s for s in value.shape if not isinstance(s, int) and tokens in s.node.expr.free_symbols
        ]
        if len(sizes) > 1:
            raise fail(
                f"a tensor of T x T elements is left: {_description(value, False)}", node, region
            )


def _check_tables(module: IRModule) -> None:
    names = {n.name for n in placeholders(module.root.graph)}
    for table in ("weights", "inputs", "states"):
        for name in getattr(module, table):
            if name not in names:
                raise PassError(f"{table} binds {name}, which is no placeholder of the program")
    if len(module.outputs) + len(module.states) > len(outputs(module.root.graph)):
        raise PassError(f"the program returns fewer values than {module.outputs} and its states")


def _check_state(module: IRModule, name: str, index: int) -> None:
    """Check that a cache is written once and before it is read, and that the result is returned."""
    holder = next(n for n in placeholders(module.root.graph) if n.name == name)
    values = outputs(module.root.graph)
    if not 0 <= index < len(values):
        raise fail("the cache has no next value", holder)
    if values[index] not in _next_values(holder):
        raise fail(f"output {index} is not the cache that this step wrote", holder)


def _next_values(holder: fx.Node) -> list[fx.Node]:
    """Return the nodes of holder's graph that are the state after the one write to it."""
    if len(holder.users) != 1:
        readers = ", ".join(u.name for u in holder.users) or "nothing"
        raise fail(f"the old cache is used by {readers}, expected one write", holder)
    (user,) = holder.users
    if user.op == "call_function" and user.target in WRITTEN:
        position = next(i for i, a in enumerate(user.args) if a is holder)
        parts = WRITTEN[user.target]
        if position not in parts:
            raise fail(f"the cache is written to another cache by {user.name}", holder)
        return _items(user, parts[position])
    if user.op != "call_module":
        raise fail(f"the cache is read by {user.name} before it is written", holder)
    body = body_of(user)
    inner = placeholders(body.graph)[user.args.index(holder)]
    results, written = outputs(body.graph), _next_values(inner)
    found = [i for i, r in enumerate(results) if r in written]
    if not found:
        raise fail(f"{user.name} writes the cache and does not return it", holder)
    if not isinstance(user.meta["val"], tuple):
        return [user]
    return [item for i in found for item in _items(user, i)]


def _items(node: fx.Node, index: int) -> list[fx.Node]:
    return [u for u in node.users if u.target is operator.getitem and u.args[1] == index]
