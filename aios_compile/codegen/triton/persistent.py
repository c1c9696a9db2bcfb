"""Persistent decode: the kernels of a decoder layer as phases of one launch, handed over by flags.

A launch has as many programs as the card holds at once. A phase is one kernel of the layer, its
text unchanged; its work items (what was a grid) are dealt out round robin: program p does p, p +
programs, ... A program goes through the phases in order. When it has done its items of a phase it
adds their number to the phase's flag (release); before its first item of the next phase it waits
until that flag has all items (acquire), and fetches the item's weights into L2 before it waits.
There is no grid barrier: who has no items in a phase neither waits for it nor is waited for, and
where an item needs a part of the phase before, it waits for that part's flag (handover.py): heads
are attended to as soon as their own queries, keys and values are there.

Order. What an item reads was made by items that it has waited for, or that these had: the flags'
releases and acquires chain (PTX memory model, causality order). Attention has items of every head,
so the phase after it begins when the linear before it has ended too. The memory plan keeps what two
phases in a row touch apart (lower.py), and each phase has its own counters.
No deadlock. All programs are resident: their number is at most multiprocessors x programs that one
holds by the compiler's report (occupancy.py), and the executor refuses a device with fewer. A
program waits only for items of earlier phases; the programs that have them do not wait for it
there, so by induction over the phases every flag fills.
Flags are zero before and after a launch: who adds the last items of the last phase clears them. By
then every item has ended, so every wait is over. Nothing depends on the number of tokens or on the
host, so a launch can be captured in a bucket's graph and replayed. With dependent launches every
program waits for the kernel before (gdc_wait) before it looks at a flag: that kernel's flags may
not be cleared yet.
In the interpreter, whose programs run one behind the other, each phase is a launch of the same
text (FIRST, LAST), so nothing waits there; tests/interpreted/interleaved.py runs the whole launch.
More than MOST tokens: the layer's own kernels, one launch each as ever.
Source: Mirage persistent kernel (2025) and Hazy Research's Llama megakernel (2025) for phases with
counters instead of barriers; stream-K (Osama et al., 2023) for the flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aios_compile.codegen.program import Ref
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.cards import Card
from aios_compile.codegen.triton.dependent_launch import WAIT
from aios_compile.codegen.triton.frame import JIT
from aios_compile.codegen.triton.handover import Heads, handover, heads_between
from aios_compile.codegen.triton.module_parts import (
    ModuleParts,
    PartLaunch,
    merged_definitions,
    take_apart,
)
from aios_compile.codegen.triton.persistent_text import FLAGS, LAUNCHES, MODULE
from aios_compile.errors import CodegenError

MOST = 32  # tokens that the phases serve: as many as the linears stream weights for
WARPS = 4  # of every phase: attention's and the tensor cores'
LINE = 32  # integers of a line of L2: a flag each
ADVICE = "load with persistent_decode=False: one launch a kernel"


@dataclass(frozen=True)
class Run:
    """Consecutive launches that become one.

    sources, operands: each kernel and where its operands are among the launch's; counters: the
    place of the counters there; types: Triton's type of each; refs: where each lies.
    """

    name: str
    sources: tuple[KernelSource, ...]
    operands: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    counters: int
    refs: tuple[Ref, ...] = ()


@dataclass(frozen=True)
class Flags:
    """Where phases count. counters: the first of each phase's own; flags: of each phase, by number;
    heads: by which a phase hands over to the next, if it does.
    """

    counters: tuple[int, ...]
    first: int
    flags: tuple[int, ...]
    heads: tuple[Heads | None, ...]

    def num_flags(self) -> int:
        return self.flags[-1] + 1


def flags_of(run: Run, parts: Sequence[ModuleParts]) -> Flags:
    """Return the counters and flags of a launch: each phase's counters, then the flags."""
    counters = [0]
    for source in run.sources:
        counters.append(counters[-1] + -(-source.counters // LINE) * LINE)
    heads: list[Heads | None] = []
    for p in range(len(parts) - 1 if run.refs else 0):
        refs = [[run.refs[i] for i in run.operands[q]] for q in (p, p + 1)]
        heads.append(heads_between(parts[p], parts[p + 1], *refs))
    heads += [None] * (len(parts) - len(heads))
    counts = [found.count if found else 1 for found in heads]
    flags = tuple(sum(counts[:p]) for p in range(len(parts)))
    return Flags(tuple(counters[:-1]), counters[-1], flags, tuple(heads))


def bounds(parts: Sequence[ModuleParts]) -> list[int]:
    """Return the row bounds of the joined variants, ascending; MOST is the last.

    Raises CodegenError for kernels whose variants are picked by different sizes.
    """
    other = next((p for p in parts if p.rows != parts[0].rows), None)
    if other is not None:
        raise CodegenError(
            f"{other.source.symbol} goes by {other.rows} rows and {parts[0].source.symbol} by "
            f"{parts[0].rows}: no one launch has both",
            advice=ADVICE,
        )
    found = {most for p in parts for most, _ in p.variants if most is not None and most < MOST}
    return sorted({*found, MOST})


def emit(run: Run, card: Card, resident: dict[int, int] | None = None) -> KernelSource:
    """Return the module. resident: row bound -> programs that a multiprocessor holds; a bound that
    is left out keeps its own launches. None: one program, for every bound.

    Raises CodegenError, naming the kernel, for a card that cannot wait in a kernel and for a kernel
    that cannot be a phase.
    """
    if card.warp != 32:
        raise CodegenError(
            f"{card.target} ({card.name}) has no persistent decode: nothing holds its programs "
            "resident together",
            advice=ADVICE,
        )
    parts = [take_apart(source) for source in run.sources]
    held = dict.fromkeys(bounds(parts), 1) if resident is None else resident
    more = {most for part in parts for most, _ in part.variants if most is not None}
    apart = [most for most in sorted(more | {MOST}) if most not in held]
    wanted: list[set[str]] = [set() for _ in parts]
    variants = {most: _separate(parts, run.operands, most, wanted) for most in [*apart, None]}
    kernels: dict[str, None] = {}
    flags = flags_of(run, parts)
    for bound, programs in held.items():
        launches = [phase_of(part, bound) for part in parts]
        for part, launch, names in zip(parts, launches, wanted):
            kernels[_phase_text(part, launch)] = None
            names |= part.reached(launch.kernel) - {launch.kernel}
        name = f"{run.name}_{bound}"
        kernels[_kernel_text(run, name, launches, flags)] = None
        stages = max(launch.options["num_stages"] for launch in launches)
        options = f"num_warps={WARPS}, num_stages={stages}"
        options += ", **DEPENDENT" if card.dependent_launch else ""
        grid = f"{card.processors * programs}, {len(parts)}"
        variants[bound] = f"    dict(most={bound}, launches=phases({name}, {grid}, {options})),"
    if card.dependent_launch:
        wanted[0].add("wait_for_inputs")
    definitions = merged_definitions(parts, wanted)
    text = MODULE.format(
        comment="\n".join(_comment(run)),
        head=_head(card),
        definitions="\n\n\n".join([*definitions.values(), FLAGS, *kernels]),
        launches=LAUNCHES,
        types=" ".join(f'"{t}",' for t in run.types),
        resident={card.processors * n: n for n in sorted(set(held.values()))},
        variants="\n".join(variants[most] for most in [*sorted({*held, *apart}), None]),
        rows=parts[0].rows,
    )
    lines = tuple(dict.fromkeys(x for s in run.sources for x in s.model_lines))
    return KernelSource(
        run.name, run.name, "triton", text, len(run.types) - 1, (), lines, (),
        flags.first + LINE * flags.num_flags(),
    )  # fmt: skip


def phase_of(part: ModuleParts, bound: int) -> PartLaunch:
    """Return the launch that is a phase for up to `bound` tokens.

    Raises CodegenError for several launches, for other warps than WARPS, for options that one
    launch cannot have for a part of it, and for functions that ask which program they are in.
    """
    launches, symbol = part.variant(bound), part.source.symbol
    launch = launches[0]
    functions = part.reached(launch.kernel) - {launch.kernel}
    asks = [n for n in sorted(functions) if "tl.program_id" in part.definitions[n]]
    others = sorted(set(launch.options) - {"num_warps", "num_stages"})
    for wrong, what in (
        (len(launches) > 1, f"is {len(launches)} launches for {bound} tokens"),
        (launch.options.get("num_warps") != WARPS, f"has {launch.options['num_warps']} warps"),
        (bool(others), f"needs {', '.join(others)}"),
        (bool(asks), f"calls {', '.join(asks)}, which depends on the launch"),
    ):
        if wrong:
            raise CodegenError(
                f"{symbol} cannot be a phase of a persistent launch: it {what}",
                source_line=part.source.model_lines[0] if part.source.model_lines else None,
                advice=ADVICE,
            )
    return launch


def _phase_text(part: ModuleParts, launch: PartLaunch) -> str:
    """Return a kernel as a function of its item: the same body, with the wait where it read first.

    first: whether it is the program's first item of the phase. HANDED: a phase of this launch came
    before, whose flag must reach `items`; else a launch did.
    """
    _, _, text = part.definitions[launch.kernel].partition("\ndef ")
    arguments, _, body = text.partition("(")[2].partition("):\n")
    head = "program_0, program_1, programs_0, first, flag, items, HANDED: tl.constexpr"
    waits = ["    if first:", "        if HANDED:", "            await_phase(flag, items)"]
    lines = body.split("\n")
    if WAIT in lines:
        waits += ["        else:", "            wait_for_inputs()"]
        at = lines.index(WAIT)
        lines[at : at + 1] = waits
    else:
        lines = [*waits, *lines]
    body = "\n".join(lines)
    for axis in (0, 1):
        body = body.replace(f"tl.program_id({axis})", f"program_{axis}")
    body = body.replace("tl.num_programs(0)", "programs_0")
    return f"@triton.jit\ndef {launch.kernel}_phase({head}, {arguments}):\n{body}"


def _kernel_text(run: Run, name: str, launches: Sequence[PartLaunch], flags: Flags) -> str:
    """Return the kernel of one row bound: FIRST to LAST of the phases, for this program."""
    last = len(launches) - 1
    handed = [handover(heads, launch) for heads, launch in zip(flags.heads, launches)]
    arguments = [f"a{i}" for i in range(len(run.types))]
    lines = [
        JIT,
        f"def {name}(",
        f"    {', '.join(arguments)}, T, S, R, P,",
        "    FIRST: tl.constexpr, LAST: tl.constexpr,",
        "):  # fmt: skip",
        "    program, programs = tl.program_id(0), tl.num_programs(0)",
        f"    flags = a{run.counters} + {flags.first}",
    ]
    for p, launch in enumerate(launches):
        extents = [x.replace("min(", "tl.minimum(") for x in launch.grid]
        lines += [f"    across_{p} = {extents[0]}", f"    items_{p} = across_{p}"]
        lines[-1] += f" * {extents[1]}" if len(extents) > 1 else ""
    for p, (launch, operands, source) in enumerate(zip(launches, run.operands, run.sources)):
        item = "item, 0" if len(launch.grid) == 1 else f"item % across_{p}, item // across_{p}"
        before = handed[p - 1] if p else None
        flag = f"flags + {LINE * flags.flags[p - 1]}, items_{p - 1}" if p else "flags, 0"
        if before is not None:
            place = f"{LINE * flags.flags[p - 1]} + item // across_{p} * {LINE}"
            flag = f"flags + {place}, {before.items()}"
        own = arguments[run.counters] + (f" + {flags.counters[p]}" if flags.counters[p] else "")
        given = [own if i == run.counters else arguments[i] for i in operands]
        given += ["T, S, R, P", *launch.constexprs.values()]
        after = handed[p]
        item = "made_by, 0" if after is not None else item
        made = [f"            if LAST > {p + 1}:"]
        made += [f"                made(flags + {LINE * flags.flags[p]} + head * {LINE})"]
        lines += [
            f"    if FIRST <= {p} and LAST > {p}:  # {source.symbol}",
            "        item = program",
            f"        while item < items_{p}:  # in a `for` Triton would pipeline no inner loop",
            *(f"            {line}" for line in (after.lines() if after else ())),
            f"            {launch.kernel}_phase(",
            f"                {item}, across_{p}, {'True' if before else 'item == program'},",
            f"                {flag}, FIRST < {p},",
            f"                {', '.join(given)},",
            "            )",
            *(made if after else ()),
            "            item += programs",
        ]
        done = f"ended(flags + {LINE * flags.flags[p]}, program, programs, items_{p})"
        if p == 0 and "wait_for_inputs" in run.sources[0].text:
            lines += [
                "        if program >= items_0:  # its flags may be those of the launch before",
                "            wait_for_inputs()",
            ]
        if p < last and after is None:
            lines += [f"        if LAST > {p + 1}:", f"            if program < items_{p}:"]
            lines += [f"                {done}"]
    count = flags.num_flags()
    lines += [
        f"    if FIRST < {last} and LAST > {last}:",
        f"        if program < items_{last}:",
        f"            if {done} == items_{last}:  # every wait is over",
        f"                flag = tl.arange(0, {1 << (count - 1).bit_length()})",
        f"                tl.store(flags + flag * {LINE}, 0, mask=flag < {count})",
    ]
    return "\n".join(lines)


def _separate(
    parts: Sequence[ModuleParts],
    operands: Sequence[tuple[int, ...]],
    most: int | None,
    wanted: Sequence[set[str]],
) -> str:
    """Return the variant in which every kernel has its own launches; wanted gets what they use."""
    lines = [f"    dict(most={most}, launches=("]
    for part, places, names in zip(parts, operands, wanted):
        for launch in part.variant(most):
            names |= part.reached(launch.kernel)
            given = ", ".join(f"{k}={v}" for k, v in launch.constexprs.items())
            options = ", ".join(f"{k}={v}" for k, v in launch.options.items())
            depends = "**DEPENDENT, " if WAIT in part.source.text else ""
            grid = ", ".join(launch.grid)
            lines += [
                f"        dict(kernel={launch.kernel}, operands={places},",
                f"            grid=lambda T, S, R, P: ({grid},),",
                f"            constexprs=dict({given}), options=dict({depends}{options})),",
            ]
    return "\n".join([*lines, "    )),"])


def _head(card: Card) -> str:
    """Return what every module begins with; wait_for_inputs comes with the definitions."""
    lines = ["INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))"]
    if card.dependent_launch:
        lines.append('DEPENDENT = {} if INTERPRETED.value else {"launch_pdl": True}')
    return "\n".join(lines)


def _comment(run: Run) -> list[str]:
    told = [f"# {run.name}: {len(run.sources)} kernels in one launch for up to {MOST} tokens"]
    told += [f"#   phase {p}: {source.symbol}" for p, source in enumerate(run.sources)]
    lines = dict.fromkeys(x for source in run.sources for x in source.model_lines)
    return [*told, *(f"# model: {line}" for line in lines)]
