"""Compile an IRModule made in a test into a library and run it: emit, lower, build, pack, run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aios_compile.codegen.cpp import build
from aios_compile.codegen.cpp.emitters import EMITTERS
from aios_compile.codegen.cpp.step import emit_step
from aios_compile.codegen.emit_kernels import emit_kernels
from aios_compile.codegen.lower import lower
from aios_compile.codegen.operand import dim_value
from aios_compile.codegen.pack_weights import pack_weights, to_numpy
from aios_compile.codegen.program import Program
from aios_compile.ir.module import IRModule
from aios_compile.passes.context import PassOptions
from aios_compile.passes.pipeline import FUSE, RAISE
from aios_compile.passes.plan_memory import plan_memory
from aios_compile.passes.runner import Stage, run_pipeline
from aios_compile.runtime.program_runner import ProgramRunner

OBJECTS = Path(tempfile.gettempdir()) / f"aios-test-objects-{os.getuid()}"
FRAME = 'File "graphs.py", line 1, in run\n    a random program'


class _Memory:
    """A TensorWriter that keeps arrays in memory, aligned as in weights.bin."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}

    def add_tensor(self, name: str, array: Any, dtype: str | None = None) -> None:
        raw = np.zeros(array.nbytes + 64, np.uint8)
        begin = -raw.ctypes.data % 64
        target = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        target[...] = array
        self.arrays[name] = target


class CompiledGraph:
    """A compiled root graph. Call it with sizes and inputs by name; returns outputs by position."""

    def __init__(self, module: IRModule, program: Program, runner: ProgramRunner) -> None:
        self.module = module
        self.program = program
        self.runner = runner

    def __call__(self, sizes: Mapping[str, int], **inputs: Tensor) -> list[Tensor]:
        arrays = {name: np.ascontiguousarray(to_numpy(x)) for name, x in inputs.items()}
        self.runner.run(arrays, sizes["T"], sizes.get("S", 1), sizes.get("R", 1))
        results = []
        for entry in self.program.outputs:
            shape = [dim_value(d, sizes) for d in entry.shape]
            flat = self.runner.outputs[entry.name].reshape(-1)[: int(np.prod(shape))]
            results.append(torch.from_numpy(flat.copy().reshape(shape)))
        return results


def compile_graph(
    module: IRModule,
    sizes: Mapping[str, int],
    stages: Sequence[Stage] = (RAISE, FUSE),
    num_threads: int = 2,
    extra_flags: Sequence[str] = ("-O1",),
    verify: int = 0,
) -> CompiledGraph:
    """Run `stages` on a module without regions and compile it for at most `sizes`."""
    for node in module.root.graph.find_nodes(op="placeholder"):
        if node.name not in module.weights:
            module.inputs.setdefault(node.name, node.name)
    for node in module.root.graph.nodes:
        if node.op == "call_function":  # a built-in called directly leaves no Python frame
            node.meta["stack_trace"] = node.meta.get("stack_trace") or FRAME
    count = len(module.root.graph.output_node().args[0])  # type: ignore[arg-type]
    module.outputs = tuple(f"out{i}" for i in range(count))
    run_pipeline(module, stages, PassOptions(), verify=verify)
    emitted = emit_kernels(module, EMITTERS)
    full = {"S": 4, "R": 4, "P": 0, **sizes}
    program = lower(module, emitted, full, {}, plan_memory)
    step = emit_step(program, tuple(emitted.sources))
    target = build.Target.host()
    texts: list[build.Source] = [*emitted.sources, ("step", step)]
    objects = build.build_objects(texts, OBJECTS, target, extra_flags=extra_flags)
    library = Path(tempfile.mkdtemp(prefix="aios-graph-")) / "lib.so"
    build.link(objects, library)
    memory = _Memory()
    pack_weights(program, module, lambda name: module.tensors[name], memory)
    runner = ProgramRunner(program, build.load(library), memory.arrays, num_threads, guarded=True)
    library.unlink()
    library.parent.rmdir()
    return CompiledGraph(module, program, runner)
