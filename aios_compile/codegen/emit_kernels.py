"""Choose an emitter for each kernel call and emit its text; equal texts become one kernel."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from aios_compile.codegen.layout import base_of, check_dense, kernel_calls
from aios_compile.codegen.linear_tail import streams_of
from aios_compile.codegen.operand import Operand, dim_of
from aios_compile.codegen.packing import has_halves, with_halves
from aios_compile.codegen.source import KernelSource
from aios_compile.errors import CodegenError
from aios_compile.ir import ops, provenance
from aios_compile.ir.module import IRModule, body_of, outputs, placeholders

assert ops.TABLE, "the op table registers the aios operators"
aios = torch.ops.aios
LAYOUTS = {  # of the weight of a linear on the C++ target; "" for quantised rows
    aios.linear.default: "rows16",
    aios.linear: "rows16",
    aios.bf16_linear.default: "pairs16",
    aios.quantized_linear.default: "",
}


@dataclass
class Emitted:
    """The kernels of a program. `by_call`: kernel call node -> index into `sources`.

    `packed`: (kernel call, operand index) -> layout of the weight that it reads. `joined`: region
    whose kernels one persistent launch runs -> that launch's index.
    """

    sources: list[KernelSource] = field(default_factory=list)
    by_call: dict[fx.Node, int] = field(default_factory=dict)
    packed: dict[tuple[fx.Node, int], str] = field(default_factory=dict)
    joined: dict[str, int] = field(default_factory=dict)


def emit_kernels(
    module: IRModule,
    emitters: Sequence[Any],
    on_progress: Callable[[int, int], None] | None = None,
    packs: bool = True,
) -> Emitted:
    """Emit every kernel of a level-3 module. Raises CodegenError naming the model line.

    packs: store the weights of linears in blocks of rows (the C++ target), else as they are;
    quantised ones are planar there.
    """
    emitted = Emitted()
    graphs = list(module.graphs().items())
    calls = [(name, call) for name, gm in graphs for call in kernel_calls(gm.graph)]
    streamed = _streamed_weights(module) if packs else None
    digests: dict[str, int] = {}
    for i, (region, call) in enumerate(calls):
        operands = _operands(call, module, region, streamed, emitted)
        source = _emit(call, operands, emitters)
        digest = source.digest()
        if digest not in digests:
            digests[digest] = len(emitted.sources)
            emitted.sources.append(source)
        emitted.by_call[call] = digests[digest]
        _note_in_place(call, source, module, region)
        if on_progress is not None:
            on_progress(i + 1, len(calls))
    return emitted


def tensor_arguments(call: fx.Node) -> list[fx.Node]:
    """Return the arguments that are tensors (sizes are not operands: a kernel knows T)."""
    return [a for a in call.args if isinstance(a, fx.Node) and _is_tensor(a)]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


def linear_weights(call: fx.Node, packs: bool = True) -> dict[int, str]:
    """Return the layouts of the operands that a kernel body needs packed: weights that linears
    stream, and quantised tables.
    """
    body = body_of(call)
    holders = [p for p in placeholders(body.graph) if _is_tensor(p)]
    found, rows = {}, "quant16" if packs else "planar"
    for node in body.graph.nodes:
        if node.target in LAYOUTS and node.args[1] in holders:
            index = holders.index(node.args[1])
            if node.target is aios.quantized_linear.default:
                found[index] = f"{rows}.{node.args[2]}"
            elif packs:
                found[index] = LAYOUTS[node.target]
            if packs:
                found[index] = layout_in(body, node.args[1], found[index])
        if node.target is aios.quantized_expert_linear.default and node.args[1] in holders:
            found[holders.index(node.args[1])] = f"{rows}.{node.args[3]}"
        if node.target is aios.quantized_embedding.default and node.args[0] in holders:
            found[holders.index(node.args[0])] = f"{rows}.{node.args[2]}"
    return found


def layout_in(body: fx.GraphModule, weight: fx.Node, layout: str) -> str:
    """Return the layout of a linear's weight in a kernel: that which it has alone, or, where the
    kernel combines the halves of its rows, the one with both halves' blocks by turns.
    """
    rows = dim_of(weight.meta["val"].shape[0])
    gated = isinstance(rows, int) and streams_of(body, rows) == 2
    return with_halves(layout) if gated else layout


def _streamed_weights(module: IRModule) -> dict[str, str]:
    """Return the outer weights that some linear streams, with the layout that it reads."""
    streamed: dict[str, str] = {}
    for region, graph_module in module.graphs().items():
        for call in kernel_calls(graph_module.graph):
            arguments = tensor_arguments(call)
            for index, layout in linear_weights(call).items():
                names = bound_weights(module, region, arguments[index])
                streamed.update(dict.fromkeys(names, layout))
    return streamed


def bound_weights(module: IRModule, region: str, node: fx.Node) -> list[str]:
    """Return the outer weight names that a placeholder stands for; empty when it is no weight."""
    if node.op != "placeholder":
        return []
    if not region:
        return [node.name] if node.name in module.weights else []
    position = placeholders(node.graph).index(node)
    names = [str(call.args[position]) for call in module.calls(region)]
    return names if all(name in module.weights for name in names) else []


def _operands(
    call: fx.Node, module: IRModule, region: str, streamed: dict[str, str] | None, emitted: Emitted
) -> list[Operand]:
    body = body_of(call)
    arguments = tensor_arguments(call)
    holders = [p for p in placeholders(body.graph) if _is_tensor(p)]
    weights = linear_weights(call, streamed is not None)
    tables = [
        holders.index(n.args[0])
        for n in body.graph.nodes
        if n.target is torch.ops.aten.embedding.default and n.args[0] in holders
    ]
    operands = []
    for i, (holder, argument) in enumerate(zip(holders, arguments)):
        names = bound_weights(module, region, argument)
        shared = {(streamed or {}).get(name) for name in names}  # a head's tied table
        shared -= {found for found in shared if found and has_halves(found)}
        table = shared.pop() if i in tables and len(shared) == 1 else None
        layout = weights.get(i, table) if names else None
        if layout:
            emitted.packed[call, i] = layout
        operands.append(Operand.of_value(holder.name, argument.meta["val"], layout))
    for i, result in enumerate(outputs(body.graph)):
        operands.append(Operand.of_value(f"out{i}", result.meta["val"]))
    return operands


def _emit(call: fx.Node, operands: list[Operand], emitters: Sequence[Any]) -> KernelSource:
    body = body_of(call)
    try:
        for emitter in emitters:
            spec = emitter.spec_of(body, operands)
            if spec is not None:
                source = emitter.emit(spec)
                assert isinstance(source, KernelSource)
                return _named(source, call)
    except CodegenError as error:
        if error.source_line:
            raise
        line = provenance.source_line(call) or None
        raise CodegenError(error.message, source_line=line, advice=error.advice) from error
    ops = ", ".join(str(n.target) for n in body.graph.nodes if n.op == "call_function")
    raise CodegenError(
        f"no emitter for kernel {call.target} ({ops})",
        source_line=provenance.source_line(call) or None,
        advice="dump the model and look at level 3; CONTRIBUTING.md says how to add an emitter",
    )


def _named(source: KernelSource, call: fx.Node) -> KernelSource:
    """Name a kernel after what it computes, with eight digits of its text: add_rms_norm_1f0c..."""
    title = re.sub(r"_\d+$", "", str(call.target))
    own = re.compile(rf"\b{re.escape(source.symbol)}(?=\b|_)")
    # the emitter's symbol may tell of names in the body, which are no part of what is computed
    neutral = dataclasses.replace(source, text=own.sub(title, source.text))
    symbol = f"{title}_{neutral.digest()[:8]}"
    text = own.sub(symbol, source.text)
    return dataclasses.replace(
        source, name=symbol, symbol=symbol, text=text, model_lines=provenance.source_lines(call)
    )


def _note_in_place(call: fx.Node, source: KernelSource, module: IRModule, region: str) -> None:
    """Record results that overwrite a state; every other result must be dense memory."""
    arguments, results = tensor_arguments(call), outputs(body_of(call).graph)
    in_place = {}
    for result, operand in source.inplace:
        base = base_of(arguments[operand])
        if _is_state(module, region, base.node):
            in_place[result] = call.args.index(arguments[operand])
    call.meta["written_in_place"] = in_place
    for i, result in enumerate(results):
        if i not in in_place:
            check_dense(call, result.meta["val"])


def _is_state(module: IRModule, region: str, node: fx.Node) -> bool:
    if node.op != "placeholder":
        return False
    if not region:
        return node.name in module.states
    position = placeholders(node.graph).index(node)
    return all(str(call.args[position]) in module.states for call in module.calls(region))
