"""Write the step: every phase of every function in order, with a barrier after each.

One parallel region a step. The text does not grow with depth: a region is one function, and its
calls are a loop over rows of argument pointers.
"""

from __future__ import annotations

from collections.abc import Iterator

from aios_compile.codegen.cpp.precompiled import STEP
from aios_compile.codegen.program import Function, Launch, Program, RegionCall
from aios_compile.codegen.source import KernelSource

HEAD = """\
/* The step: {launches} launches, {barriers} barriers for one pass over the model.
   Each phase's kernels share the workers; a barrier follows each phase. */
#include "prelude.h"
#include "{step}"

extern "C" {{
{declarations}
}}
"""

FINISH = """
int64_t {name}_finish_items(const Sizes *n, void *const *p);
void {name}_finish(const Sizes *n, void *const *p, int64_t begin, int64_t end);"""

TAIL = """
extern "C" int64_t step_num_counters(void) { return %d; }
"""


def emit_step(program: Program, sources: tuple[KernelSource, ...]) -> str:
    """Return step.cpp for a program whose kernels are `sources`, in the same order."""
    declarations = "\n".join(
        f"int64_t {s.symbol}_items(const Sizes *n);\n"
        + "\n".join(_declared(s, n) for n in _names(s))
        for s in sources
    )
    head = HEAD.format(
        launches=program.num_launches,
        barriers=num_barriers(program),
        step=STEP,
        declarations=declarations,
    )
    head += "".join(_candidates(source) for source in sources if source.candidates)
    bodies = [_function(program, function, sources) for function in program.functions]
    return head + "\n".join(bodies) + TAIL % _num_counters(program, sources)


def _names(source: KernelSource) -> list[str]:
    """Return the symbols of a kernel and of its candidates."""
    return [source.symbol, *(f"{source.symbol}_{c.name}" for c in source.candidates)]


def _declared(source: KernelSource, name: str) -> str:
    text = f"void {name}(const Sizes *n, void *const *p, int64_t begin, int64_t end);"
    return text + (FINISH.format(name=name) if source.finishes else "")


def _candidates(source: KernelSource) -> str:
    """Return the table from which a step takes the candidate that was chosen."""
    rows = [f"    {{{n}, {n}_finish_items, {n}_finish}},\n" for n in _names(source)]
    return f"static const aios::Candidate {source.symbol}_candidates[] = {{\n{''.join(rows)}}};\n"


def _num_counters(program: Program, sources: tuple[KernelSource, ...]) -> int:
    """Return the ranges of items that one step shares out: one or two a launch."""
    finishing = {
        f.name: sum(isinstance(i, Launch) and sources[i.kernel].finishes for i in f.items)
        for f in program.functions
    }
    calls = [i for i in program.function("step").items if isinstance(i, RegionCall)]
    inside = sum(finishing[call.region] * call.count for call in calls)
    return program.num_launches + finishing["step"] + inside


def num_barriers(program: Program) -> int:
    """Return the barriers of one step, the regions' repetitions included."""
    inner = {f.name: len(_phases(f)) for f in program.functions if f.name != "step"}
    total = 0
    for phase in _phases(program.function("step")):
        calls = [i for i in phase if isinstance(i, RegionCall)]
        total += sum(inner[c.region] * c.count for c in calls) if calls else 1
    return total


def _phases(function: Function) -> list[list[Launch | RegionCall]]:
    phases: dict[int, list[Launch | RegionCall]] = {}
    for item in function.items:
        phases.setdefault(item.phase, []).append(item)
    return [phases[p] for p in sorted(phases)]


def _function(program: Program, function: Function, sources: tuple[KernelSource, ...]) -> str:
    if function.name == "step":
        lines = ["static void run_step(aios::Worker *w, const Run *r) {"]
    else:
        lines = [f"static void {function.name}(aios::Worker *w, const Run *r, char *const *a) {{"]
    for number, phase in enumerate(_phases(function)):
        lines.append(f"    /* phase {number} */")
        timed = [i.kernel for i in phase if isinstance(i, Launch) and sources[i.kernel].candidates]
        for item in phase:
            if isinstance(item, RegionCall):
                lines += _region_call(program, item)
            else:
                lines += _launch(item, sources[item.kernel])
        if not any(isinstance(item, RegionCall) for item in phase):
            lines.append(f"    aios::barrier(w, r, {timed[0] if timed else -1});")
    return "\n".join([*lines, "}"]) + "\n"


def _launch(item: Launch, source: KernelSource) -> Iterator[str]:
    yield from (f"    // {line}" for line in source.model_lines[:4])
    pointers = ", ".join(ref.text() for ref in item.operands)
    yield f"    {{ char *const p[] = {{{pointers}}};"
    kernel = f"{source.symbol}_items, {source.symbol}"
    if source.finishes:
        kernel += f", {source.symbol}_finish_items, {source.symbol}_finish"
    if source.candidates:
        kernel = f"{source.symbol}_items, {source.symbol}_candidates[r->choices[{item.kernel}]]"
    yield f"      aios::launch(w, r, {kernel}, reinterpret_cast<void *const *>(p)); }}"


def _region_call(program: Program, item: RegionCall) -> Iterator[str]:
    width = len(program.function(item.region).rows[0])
    begin = row_offset(program, item.region)
    yield f"    for (int64_t i = {item.first}; i < {item.first + item.count}; i++)"
    yield f"        {item.region}(w, r, r->rows + {begin} + i * {width});"


def row_offset(program: Program, region: str) -> int:
    """Return where a region's argument rows begin in the table of all rows."""
    total = 0
    for function in program.functions:
        if function.name == region:
            return total
        total += sum(len(row) for row in function.rows)
    raise KeyError(region)
