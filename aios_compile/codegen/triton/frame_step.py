"""Put the kernel that unfolds the step's packet before a program, and the one that collects behind.

Both are launches of the program like all others: planned, compiled ahead, captured, shown.
"""

from __future__ import annotations

from dataclasses import replace

from aios_compile.codegen.emit_kernels import Emitted
from aios_compile.codegen.program import Kernel, Launch, Program, Ref
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.step_results import SAMPLED, StepResults
from aios_compile.codegen.triton import collect_results, prepare_step
from aios_compile.codegen.triton.cards import Card, card_of
from aios_compile.codegen.triton.dependent_launch import with_dependent_launch


def frame_step(program: Program, emitted: Emitted) -> Program:
    """Return the program with both kernels; `emitted.sources` gets theirs.

    Raises CodegenError for an input that is not known.
    """
    card = card_of(program.settings["target"])
    offsets = {e.name: e.offset for e in program.outputs}
    sampled = [Ref("arena", offsets[SAMPLED])] if SAMPLED in offsets else []
    prepare = prepare_step.emit(
        prepare_step.spec_of(
            program.inputs, program.settings["page_size"], max(1, program.sizes["S"]), bool(sampled)
        )
    )
    inputs = [Ref("input", i) for i in range(len(program.inputs))]
    operands = (Ref("packet", 0), *sampled, *inputs)
    first = Launch(_index(emitted, prepare, card), operands, 0, prepare_step.NAME)
    before, behind = [first], []
    spec = StepResults.of(program.outputs, program.sizes)
    if spec.outputs:
        rows = [Ref("arena", offsets[name]) for name, *_ in spec.outputs]
        collect = _index(emitted, collect_results.emit(spec), card)
        behind = [Launch(collect, (*rows, *[Ref("results", 0)] * 2), 0, collect_results.NAME)]
    functions = tuple(
        replace(f, items=(*before, *f.items, *behind)) if f.name == "step" else f
        for f in program.functions
    )
    return replace(
        program,
        kernels=tuple(
            Kernel(s.name, s.symbol, s.digest(), s.model_lines, s.candidates)
            for s in emitted.sources
        ),
        functions=functions,
        num_launches=program.num_launches + len(before) + len(behind),
    )


def _index(emitted: Emitted, source: KernelSource, card: Card) -> int:
    """Return the index of a source, added unless it is there (a model planned for two sizes)."""
    source = with_dependent_launch(source) if card.dependent_launch else source
    for index, other in enumerate(emitted.sources):
        if other.digest() == source.digest():
            return index
    emitted.sources.append(replace(source, emitter=source.name))
    return len(emitted.sources) - 1
