"""Compile a program without a model into a C++ library and run it: emit, lower, build, pack."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from aios_compile.codegen.cpp import build
from aios_compile.codegen.cpp.emitters import EMITTERS
from aios_compile.codegen.cpp.step import emit_step
from aios_compile.codegen.emit_kernels import emit_kernels
from aios_compile.codegen.lower import lower
from aios_compile.codegen.operand import dim_value
from aios_compile.codegen.pack_weights import from_numpy, pack_weights, to_numpy
from aios_compile.codegen.program import Program
from aios_compile.codegen.source import KernelSource
from aios_compile.ir.module import IRModule, placeholders
from aios_compile.passes.context import PassOptions
from aios_compile.passes.pipeline import FUSE, RAISE
from aios_compile.passes.plan_memory import plan_memory
from aios_compile.passes.result import PassResult
from aios_compile.passes.runner import Stage, run_pipeline
from aios_compile.runtime.program_runner import ProgramRunner

FRAME = 'File "program.py", line 1, in program\n    a random program'
# The meaning is tested, not the speed: half the compile time of -O1 (a linear: 0.25 s, not 0.49).
QUICK = ("-Og",)
INCLUDE = re.compile(r"^#include .*$", re.MULTILINE)
SAMPLER_LISTS = ("NP", "NB", "NA")


def _quick_linker() -> tuple[str, ...]:
    """Return the flag for gold where it is there: 0.03 s a library, GNU ld takes 0.08 s."""
    return ("-fuse-ld=gold",) if shutil.which("ld.gold") else ()


def one_source(sources: Sequence[KernelSource], step: str) -> tuple[str, str]:
    """Return all texts of a program as one, named: to start g++ takes as long as a small kernel.

    Each kernel is in a namespace of its own; what has C linkage keeps its name.
    """
    texts = [source.text for source in sources]
    includes = dict.fromkeys(line for text in [*texts, step] for line in INCLUDE.findall(text))
    parts = [f"namespace part{i} {{\n{INCLUDE.sub('', t)}}}\n" for i, t in enumerate(texts)]
    return "program", "\n".join([*includes, *parts, INCLUDE.sub("", step)])


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


@dataclass
class CompiledGraph:
    """A compiled program. Call it with sizes and inputs by name; returns outputs by position."""

    module: IRModule
    program: Program
    runner: ProgramRunner
    results: list[PassResult] = field(default_factory=list)

    def __call__(self, sizes: Mapping[str, int], **inputs: Tensor) -> list[Tensor]:
        arrays = {name: np.ascontiguousarray(to_numpy(x)) for name, x in inputs.items()}
        self.runner.run(arrays, sizes["T"], sizes.get("S", 1), sizes.get("R", 1))
        results = []
        for entry in self.program.outputs:
            shape = [dim_value(d, sizes) for d in entry.shape]
            flat = self.runner.outputs[entry.name].reshape(-1)[: int(np.prod(shape))]
            results.append(from_numpy(flat.copy().reshape(shape), entry.dtype.upper()))
        return results


def prepare(module: IRModule) -> None:
    """Bind what a traced function leaves open: its inputs, names of outputs, source lines."""
    for node in placeholders(module.root.graph):
        if node.name not in module.weights:
            module.inputs.setdefault(node.name, node.name)
        node.meta["stack_trace"] = node.meta.get("stack_trace") or FRAME
    for graph_module in module.graphs().values():
        for node in graph_module.graph.nodes:
            if node.op == "call_function":  # a built-in called directly leaves no Python frame
                node.meta["stack_trace"] = node.meta.get("stack_trace") or FRAME
    count = len(module.root.graph.output_node().args[0])  # type: ignore[arg-type]
    module.outputs = ("logits", *(f"out{i}" for i in range(1, count)))


def compile_graph(
    module: IRModule,
    sizes: Mapping[str, int],
    stages: Sequence[Stage] = (RAISE, FUSE),
    num_threads: int = 2,
    extra_flags: Sequence[str] = QUICK,
    verify: int = 0,
    *,
    objects: Path,
    options: PassOptions | None = None,
    disabled: Sequence[str] = (),
) -> CompiledGraph:
    """Run `stages` on a program and compile it for at most `sizes`. objects: keeps built kernels.

    Raises AiosError for what cannot be compiled.
    """
    options = options or PassOptions()
    prepare(module)
    results = run_pipeline(module, stages, options, disabled=disabled, verify=verify)
    emitted = emit_kernels(module, EMITTERS)
    full = {"S": 4, "R": 4, "P": 0, **dict.fromkeys(SAMPLER_LISTS, 0), **sizes}
    program = lower(module, emitted, full, {}, plan_memory)
    step = emit_step(program, tuple(emitted.sources))
    text, target = one_source(tuple(emitted.sources), step), build.Target.host()
    built = build.build_objects(
        [text], objects, target, extra_flags=extra_flags, many_programs=True
    )
    memory = _Memory()
    pack_weights(program, module, lambda name: module.tensors[name], memory)
    with tempfile.TemporaryDirectory(prefix="aios-graph-") as folder:
        library = Path(folder) / "lib.so"
        build.link(built, library, extra_flags=_quick_linker())
        runner = ProgramRunner(
            program,
            build.load(library),
            memory.arrays,
            num_threads,
            num_pages=options.num_pages if module.states else 0,
            page_table_width=options.max_pages_per_sequence,
            guarded=True,
        )
    return CompiledGraph(module, program, runner, results)
