"""The Triton target: a level-3 program whose kernels run in Triton's interpreter, or on a GPU.

For the interpreter TRITON_INTERPRET=1 must be set before triton is first imported. Tensors have the
strides that level 3 says (study/triton_check.py); they come from the host and go back to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.codegen.emit_kernels import (
    Emitted,
    bound_weights,
    linear_weights,
    tensor_arguments,
)
from aios_compile.codegen.layout import kernel_calls
from aios_compile.codegen.planar import pack_planar
from aios_compile.codegen.plane import PREFIX
from aios_compile.codegen.quantized_weights import form_of
from aios_compile.codegen.targets import emit
from aios_compile.ir.module import IRModule, body_of, is_region_call, placeholders
from aios_compile.passes.context import PassOptions
from aios_compile.passes.result import PassResult
from aios_compile.passes.runner import Stage, run_pipeline
from aios_compile.runtime.torch_device import card_name, open_device
from aios_compile.study.fuzz.compile_graph import prepare
from aios_compile.study.triton_check import TritonKernels


@dataclass(frozen=True)
class _Input:
    name: str


@dataclass(frozen=True)
class _Inputs:
    inputs: tuple[_Input, ...]


@dataclass
class InterpretedGraph:
    """A program of the Triton target. Call it as a CompiledGraph."""

    module: IRModule
    emitted: Emitted
    kernels: TritonKernels
    results: list[PassResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        module = self.module
        names = [n.name for n in placeholders(module.root.graph) if n.name in module.inputs]
        self.program = _Inputs(tuple(_Input(module.inputs[name]) for name in names))
        self.runner = self  # it owns nothing that lives longer
        with torch.no_grad():
            # as a checkpoint is packed: a recipe may give a view of a transposed matrix
            self.held = {n: r.run(module.tensors).contiguous() for n, r in module.weights.items()}
            for name, layout in _layouts(module).items():
                self.held[name] = pack_planar(self.held[name], form_of(layout), name)
        for node in placeholders(module.root.graph):
            if node.name in module.states:
                value = node.meta["val"]
                # 8-bit floats are their bits to kernels: not every card has the type
                dtype = torch.uint8 if value.dtype == torch.float8_e4m3fn else value.dtype
                self.held[node.name] = torch.zeros(tuple(map(int, value.shape)), dtype=dtype)
        place = self.kernels.device.name
        self.held = {name: value.to(place) for name, value in self.held.items()}

    def close(self) -> None:
        """Release nothing: the tensors go with the object."""

    def __call__(self, sizes: Mapping[str, int], **inputs: Tensor) -> list[Tensor]:
        full = {"S": 1, "R": 1, "P": 8, **{n: sizes[n] for n in "TSR" if n in sizes}}
        place = self.kernels.device.name
        given = [
            inputs[self.module.inputs[n.name]].to(place)
            if n.name in self.module.inputs
            else self.held[n.name]
            for n in placeholders(self.module.root.graph)
        ]
        results = self._run(self.module.root, given, full)
        states = set(self.module.states.values())
        return [r.clone().cpu() for i, r in enumerate(results) if i not in states]

    def _run(self, owner: fx.GraphModule, given: Sequence[Any], sizes: dict[str, int]) -> Any:
        env: dict[fx.Node, Any] = dict(zip(placeholders(owner.graph), given))
        for node in owner.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            if node.op == "placeholder":
                continue
            args = fx.node.map_arg(node.args, env.__getitem__)
            if node.op == "call_function":
                named = fx.node.map_arg(node.kwargs, env.__getitem__)
                env[node] = node.target(*args, **named)
            elif is_region_call(owner, node):
                env[node] = self._run(body_of(node), args, sizes)
            else:
                env[node] = self._launch(node, env, sizes)
        raise AssertionError("the graph has no output")

    def _launch(self, call: fx.Node, env: Mapping[fx.Node, Any], sizes: dict[str, int]) -> Any:
        results = self.kernels.launch(call, env, sizes)
        several = isinstance(call.meta["val"], (tuple, list))
        return tuple(results) if several else results[0]


def _layouts(module: IRModule) -> dict[str, str]:
    """Return the layout of each weight that kernels read as planes of codes."""
    found: dict[str, str] = {}
    for region, graph_module in module.graphs().items():
        for call in kernel_calls(graph_module.graph):
            arguments = tensor_arguments(call)
            for index, layout in linear_weights(call, packs=False).items():
                assert layout.startswith(PREFIX)
                names = bound_weights(module, region, arguments[index])
                found.update(dict.fromkeys(names, layout))
    return found


def interpret_graph(
    module: IRModule,
    sizes: Mapping[str, int],
    stages: Sequence[Stage],
    verify: int = 0,
    *,
    objects: Path,
    options: PassOptions,
    disabled: Sequence[str] = (),
    device: Any = None,
) -> InterpretedGraph:
    """Run `stages` on a program and emit its kernels for the Triton target, into `objects`.

    device: of runtime/torch_device.py; the interpreter without one. Raises AiosError for what
    cannot be emitted.
    """
    device = device or open_device("interpreter")
    prepare(module)
    results = run_pipeline(module, stages, options, disabled=disabled, verify=verify)
    cuda = device.name.startswith("cuda")
    card = card_name(device.name) if cuda else ""
    emitted = emit(module, "cuda" if cuda else "interpreter", card=card)
    return InterpretedGraph(module, emitted, TritonKernels(emitted, objects, device), results)
