"""Run a program in eager PyTorch: as it is or in float64, all layers or some passed through."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.ir import ops
from aios_compile.ir.module import IRModule, is_region_call, outputs, placeholders

assert ops.TABLE, "the op table must be registered"
aten = torch.ops.aten
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MATMULS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.matmul.default)
LINEAR = torch.ops.aios.linear.default
BF16_LINEAR = torch.ops.aios.bf16_linear.default
PAGED_ATTENTION = torch.ops.aios.paged_attention.default
QUANTIZED_LINEAR = torch.ops.aios.quantized_linear.default
EXPERT_LINEAR = torch.ops.aios.expert_linear.default
QUANTIZED_EXPERT_LINEAR = torch.ops.aios.quantized_expert_linear.default
QUANTIZED_EMBEDDING = torch.ops.aios.quantized_embedding.default
HALVES = (torch.bfloat16, torch.float16)

# Name of a region call -> for each output, the position of the argument that is passed through.
Skips = Mapping[str, tuple[int, ...]]
Widened = Callable[..., Tensor]
Observe = Callable[[fx.Node, Any], None]


def call(
    graph_module: torch.nn.Module,
    arguments: Sequence[Any],
    *,
    computed_in: torch.dtype | None = None,
    skips: Skips | None = None,
    widened: Widened | None = None,
    observe: Observe | None = None,
    exact_halves: bool = False,
    watch: Observe | None = None,
) -> Any:
    """Run a graph, its regions and kernel bodies node by node; return what it returns.

    computed_in: every floating-point dtype written in the graph is replaced by this one (the caller
    gives such tensors). skips: region calls that return arguments instead of computing. Half
    precision matmuls are computed in float32 and rounded once: PyTorch's own are up to 100 times
    slower on a CPU without bf16 instructions, and their sums are float32 as well. A loop of its
    own, because fx.Interpreter takes longer a node than small tensors do. widened: gives the
    float32 copy of a half precision weight, to save the cast in each linear, and, called with a
    format, of quantised rows: these linears, those of bf16 activations, and attention, then have
    exact activations, so that rounding them cannot hide a pass's mistake. observe: is told the
    result of every call of a region or kernel in this graph. exact_halves: use PyTorch's own half
    precision matmuls all the same. watch: is told the value of every node of this graph and of its
    regions, as they are computed.
    """
    assert isinstance(graph_module, fx.GraphModule)
    given = iter(arguments)
    env: dict[fx.Node, Any] = {}

    def read(value: Any) -> Any:
        return fx.node.map_arg(value, env.__getitem__)

    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "output":
            return read(node.args[0])
        elif node.op == "get_attr":
            env[node] = operator.attrgetter(str(node.target))(graph_module)
        elif skips and node.name in skips:
            env[node] = tuple(env[node.args[p]] for p in skips[node.name])
        elif node.op == "call_module":
            inner = graph_module.get_submodule(str(node.target))
            values = [read(a) for a in node.args]
            env[node] = call(
                inner,
                values,
                computed_in=computed_in,
                widened=widened,
                exact_halves=exact_halves,
                watch=watch if is_region_call(graph_module, node) else None,
            )
            if observe:
                observe(node, env[node])
        else:
            args = read(node.args)
            if widened and node.target in (LINEAR, BF16_LINEAR) and _casts_weight(args):
                args = (args[0], widened(args[1]), *args[2:])
            if widened and node.target is QUANTIZED_LINEAR:
                env[node] = _dequantized_linear(widened, *args, **read(node.kwargs))
            elif widened and node.target is QUANTIZED_EXPERT_LINEAR:
                env[node] = _dequantized_experts(widened, *args, **read(node.kwargs))
            elif widened and node.target is BF16_LINEAR:
                env[node] = LINEAR(*args, **read(node.kwargs))
            elif widened and node.target is PAGED_ATTENTION:
                env[node] = _apply(
                    node, args, {**read(node.kwargs), "rounded": False}, computed_in, exact_halves
                )
            else:
                env[node] = _apply(node, args, read(node.kwargs), computed_in, exact_halves)
        if watch:
            watch(node, env[node])
    raise AssertionError("the graph has no output")


def _apply(
    node: fx.Node, args: Any, kwargs: Any, computed_in: torch.dtype | None, exact_halves: bool
) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target), f"{node.op} {node.target}"
    if kwargs.get("device") is not None:  # capture from the meta device bakes it in
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if computed_in is not None:
        args = tuple(_replaced(a, computed_in) for a in args)
        kwargs = {k: _replaced(v, computed_in) for k, v in kwargs.items()}
        if node.target is QUANTIZED_EMBEDDING:
            return node.target(*args, **kwargs).to(computed_in)
        if _promotes_integers(node, args):
            args = tuple(_as_float(a, computed_in) for a in args)
    elif not exact_halves and node.target in MATMULS and args[0].dtype in HALVES:
        wide = (a.float() if isinstance(a, Tensor) else a for a in args)
        return node.target(*wide, **kwargs).to(args[0].dtype)
    return node.target(*args, **kwargs)


def _dequantized_linear(
    widened: Widened,
    x: Tensor,
    rows: Tensor,
    form: str,
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    x = x if order is None else x[..., order]
    result: Tensor = LINEAR(x, widened(rows, form).to(x.dtype), bias)
    return result


def _dequantized_experts(
    widened: Widened,
    x: Tensor,
    rows: Tensor,
    experts: Tensor,
    form: str,
    bias: Tensor | None = None,
) -> Tensor:
    result: Tensor = EXPERT_LINEAR(x, widened(rows, form).to(x.dtype), experts, bias)
    return result


def _casts_weight(args: Any) -> bool:
    return args[1].dtype in HALVES and args[0].dtype is torch.float32


def _promotes_integers(node: fx.Node, args: Sequence[Any]) -> bool:
    """Return whether a result is of the default type because integers meet a float that is none."""
    result, tensors = node.meta.get("val"), [a for a in args if isinstance(a, Tensor)]
    floats = isinstance(result, Tensor) and result.dtype is torch.float32
    return floats and bool(tensors) and not any(a.is_floating_point() for a in tensors)


def _as_float(value: Any, dtype: torch.dtype) -> Any:
    counts = isinstance(value, Tensor) and value.dtype not in (torch.bool, *FLOATS)
    return value.to(dtype) if counts else value


def _replaced(value: Any, dtype: torch.dtype) -> Any:
    return dtype if isinstance(value, torch.dtype) and value in FLOATS else value


def run(
    module: IRModule,
    values: Mapping[str, Tensor],
    *,
    computed_in: torch.dtype | None = None,
    skips: Skips | None = None,
    widened: Widened | None = None,
    watch: Observe | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run the program on values by placeholder name; return (outputs, next states) by name."""
    arguments = [values[n.name] for n in placeholders(module.root.graph)]
    with torch.no_grad():
        result = call(
            module.root,
            arguments,
            computed_in=computed_in,
            skips=skips,
            widened=widened,
            watch=watch,
        )
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    states = {name: results[i] for name, i in module.states.items() if i >= 0}
    kept = [r for i, r in enumerate(results) if i not in set(module.states.values())]
    names = [*module.outputs, *(f"output_{i}" for i in range(len(module.outputs), len(kept)))]
    return dict(zip(names, kept)), states


def carried(module: IRModule) -> dict[str, tuple[int, ...]] | None:
    """Say how each region call can be passed through, or None when some output has no source.

    A layer's output goes to the next layer at a position; that position is what the output
    replaces. A state's next value is the state itself.
    """
    root = module.root
    calls = [n for n in root.graph.nodes if n.op == "call_module" and is_region_call(root, n)]
    inside = {user for call in calls for user in call.users}
    by_region: dict[str, set[int]] = {}
    for call in calls:
        positions = {i for i, a in enumerate(call.args) if a in inside}
        by_region.setdefault(str(call.target), set()).update(positions)
    values = outputs(root.graph)
    holders = {values[i]: name for name, i in module.states.items() if i >= 0}
    skips = {}
    for call in calls:
        states = {int(u.args[1]): holders[u] for u in call.users if u in holders}
        free = sorted(by_region[str(call.target)])
        found = _sources(call, states, free)
        if found is None:
            return None
        skips[call.name] = found
    return skips


def _sources(call: fx.Node, states: Mapping[int, str], free: list[int]) -> tuple[int, ...] | None:
    names = [a.name if isinstance(a, fx.Node) else "" for a in call.args]
    found: list[int] = []
    for i, value in enumerate(call.meta["val"]):
        if i in states:
            found.append(names.index(states[i]))
            continue
        fits = [p for p in free if _alike(call.args[p], value) and p not in found]
        if not fits:
            return None
        found.append(fits[0])
    return tuple(found)


def _alike(argument: Any, value: Tensor) -> bool:
    given = argument.meta["val"]
    return given.dtype == value.dtype and [*map(str, given.shape)] == [*map(str, value.shape)]
