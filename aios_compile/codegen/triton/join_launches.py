"""Make one persistent launch of each decoder layer's kernels in a lowered program.

Before: a region's items are its kernels, one launch each. After: one item, a module of the
kernels' own texts (persistent.py). Buffers, arguments and the memory plan stay as they are: only
who launches changes. With option persistent_decode.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aios_compile.codegen.emit_kernels import Emitted
from aios_compile.codegen.program import Function, Kernel, Launch, Program, Ref, RegionCall
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import persistent
from aios_compile.codegen.triton.cards import Card
from aios_compile.codegen.triton.compile_ahead import compile_ahead
from aios_compile.codegen.triton.module_parts import take_apart
from aios_compile.codegen.triton.occupancy import occupancy
from aios_compile.codegen.triton.persistent import Run
from aios_compile.errors import CodegenError

MOST_RESIDENT = 4  # programs of a multiprocessor: more would only wait for flags side by side


def join_launches(program: Program, emitted: Emitted, card: Card, compiles: bool) -> Program:
    """Return the program with one launch a layer call; emitted.sources and .joined get it, and
    settings["separate_launches"] how many there are for more tokens than phases serve.

    compiles: read the resources of the launch from the compiler, so that more than one program a
    multiprocessor can be resident. Raises CodegenError, naming the kernel, for a layer whose
    kernels cannot be phases and for a card without persistent launches.
    """
    functions, saved, counters = [], 0, program.counters
    calls = _calls(program)
    for function in program.functions:
        if not function.rows or len(function.items) < 2:
            functions.append(function)
            continue
        run, refs = _run(function, emitted.sources)
        resident = _resident(run, card) if compiles else None
        source = persistent.emit(run, card, resident)
        index = _index(emitted, source)
        emitted.joined[function.name] = index
        launch = Launch(index, refs, function.items[0].phase, run.name)
        functions.append(replace(function, items=(launch,)))
        saved += (len(function.items) - 1) * calls[function.name]
        counters = max(counters, source.counters)
    if not saved:
        raise CodegenError(
            "no decoder layer is called as a region: nothing to join",
            advice=persistent.ADVICE,
        )
    return replace(
        program,
        kernels=tuple(Kernel(s.name, s.symbol, s.digest(), s.model_lines) for s in emitted.sources),
        functions=tuple(functions),
        num_launches=program.num_launches - saved,
        settings={**program.settings, "separate_launches": program.num_launches},
        counters=counters,
    )


def _calls(program: Program) -> dict[str, int]:
    """Return how often a step calls each region."""
    found: dict[str, int] = {}
    for item in program.function("step").items:
        if isinstance(item, RegionCall):
            found[item.region] = found.get(item.region, 0) + item.count
    return found


def _index(emitted: Emitted, source: KernelSource) -> int:
    """Return the index of a source, added unless it is there (a model planned for two sizes)."""
    for index, other in enumerate(emitted.sources):
        if other.digest() == source.digest():
            return index
    emitted.sources.append(source)
    return len(emitted.sources) - 1


def _run(function: Function, sources: Sequence[KernelSource]) -> tuple[Run, tuple[Ref, ...]]:
    """Return a region's launches as one run, and the operands of the launch: each place once."""
    places: dict[tuple[Ref, str], int] = {}
    operands, used = [], []
    for item in function.items:
        assert isinstance(item, Launch), "regions do not nest"
        source = sources[item.kernel]
        types = take_apart(source).types
        assert len(types) == len(item.operands), item.label
        keys = zip(item.operands, types)
        operands.append(tuple(places.setdefault(key, len(places)) for key in keys))
        used.append(source)
    counters = places.setdefault((Ref("counters", 0), "*i32"), len(places))
    run = Run(
        f"persistent_{function.name}_{_digest(used, operands)}", tuple(used), tuple(operands),
        tuple(kind for _, kind in places), counters, tuple(ref for ref, _ in places),
    )  # fmt: skip
    return run, tuple(ref for ref, _ in places)


def _digest(sources: Sequence[KernelSource], operands: Sequence[tuple[int, ...]]) -> str:
    text = repr([*(source.digest() for source in sources), *operands])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@functools.cache  # a model planned for two sizes has one launch
def _resident(run: Run, card: Card) -> dict[int, int]:
    """Return how many programs of each variant a multiprocessor holds, by the compiler's report;
    none for a variant that spills: it keeps the kernels' own launches.

    Raises CodegenError when all do, or when one does not compile for the card.
    """
    with tempfile.TemporaryDirectory(prefix="aios-persistent-") as folder:
        (binaries,) = compile_ahead([persistent.emit(run, card)], card.target, Path(folder), 1)
    found, told = {}, []
    for binary in binaries:
        if binary.most is None or binary.most > persistent.MOST:
            continue
        usage = binary.usage()
        held = occupancy(usage, card).programs
        told.append(
            f"for {binary.most} tokens {usage.registers} registers, {usage.spill_bytes} bytes "
            f"spilled, {usage.shared_bytes} of shared memory"
        )
        if held and not usage.spill_bytes:
            found[binary.most] = min(MOST_RESIDENT, held)
    if not found:
        raise CodegenError(
            f"{run.name} does not fit {card.target}: {'; '.join(told)}", advice=persistent.ADVICE
        )
    return found
