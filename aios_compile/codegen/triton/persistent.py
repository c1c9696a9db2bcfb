"""Persistent decode: the kernels of a decoder layer as phases of one launch, handed over by flags.

A launch has as many programs as the card holds at once. A phase is one kernel of the layer, its
text unchanged; its work items (what was a grid) are dealt out round robin: program p does p, p +
programs, ... A program goes through the phases in order. When it has done its items of a phase it
adds their number to the phase's flag (release); before its first item of the next phase it waits
until that flag has all items (acquire), and fetches the item's weights into L2 before it waits.
There is no grid barrier: who has no items in a phase neither waits for it nor is waited for.

Order. An item of phase p + 1 begins after all items of p have ended, so after all of the phases
before: the flags' releases and acquires chain (PTX memory model, causality order). The memory plan
counts each kernel as a phase, so buffers that share memory are never alive in one.
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

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.cards import Card
from aios_compile.codegen.triton.dependent_launch import WAIT
from aios_compile.codegen.triton.frame import JIT, LAUNCH
from aios_compile.codegen.triton.module_parts import (
    ModuleParts,
    PartLaunch,
    merged_definitions,
    take_apart,
)
from aios_compile.errors import CodegenError

MOST = 32  # tokens that the phases serve: as many as the linears stream weights for
WARPS = 4  # of every phase: attention's and the tensor cores'
LINE = 32  # integers of a line of L2: a flag each
ADVICE = "load with persistent_decode=False: one launch a kernel"

FLAGS = """\
@triton.jit
def await_phase(flag, items):
    # Wait until all items of a phase have ended; what they wrote can be read then.
    seen = flag_of(flag)
    while seen < items:
        seen = flag_of(flag)


@triton.jit
def flag_of(flag):
    if INTERPRETED:
        return tl.atomic_add(flag, 0, sem="acquire")
    else:
        # every thread for itself: no exchange inside the loop, and no atomic that delays the others
        return tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [flag],
            dtype=tl.int32, is_pure=False, pack=1,
        )


@triton.jit
def ended(flag, program, programs, items):
    # Say that a program's items of a phase have ended; return the items that have.
    mine = (items - program + programs - 1) // programs
    tl.debug_barrier()  # every thread's results are written before the flag says so
    return tl.atomic_add(flag, mine, sem="acq_rel") + mine"""

LAUNCHES = '''\
def phases(kernel, programs, number, **options):
    """Return a persistent kernel's launch; one for each phase where programs run in turns."""
    spans = [(0, number)]
    if INTERPRETED.value:  # nobody may wait for a later program, and a few do all items
        spans, programs = [(p, p + 1) for p in range(number)], min(programs, 8)
    return tuple(
        dict(
            kernel=kernel, grid=lambda T, S, R, P: (programs,),
            constexprs=dict(FIRST=first, LAST=last), options=options,
        )
        for first, last in spans
    )'''

MODULE = (
    """\
{comment}
import triton
import triton.language as tl

{head}


{definitions}


{launches}


TYPES = ({types})
WORKSPACE = ()
# programs that a multiprocessor must hold at once -> how many there are
RESIDENT = {resident}
VARIANTS = (
{variants}
)


"""
    + LAUNCH
    + """        given = [operands[i] for i in call["operands"]] if "operands" in call else operands
        call["kernel"][grid](*given, T, S, R, P, **options)
"""
)


@dataclass(frozen=True)
class Run:
    """Consecutive launches that become one.

    sources, operands: each kernel and where its operands are among the launch's; counters: the
    place of the counters there; types: Triton's type of each.
    """

    name: str
    sources: tuple[KernelSource, ...]
    operands: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    counters: int


def num_counters(run: Run) -> int:
    """Return the counters of a joined launch: its phases', then a flag a phase."""
    return _first_flag(run) + LINE * len(run.sources)


def _first_flag(run: Run) -> int:
    return -(-max(s.counters for s in run.sources) // LINE) * LINE


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
    for bound, programs in held.items():
        launches = [phase_of(part, bound) for part in parts]
        for part, launch, names in zip(parts, launches, wanted):
            kernels[_phase_text(part, launch)] = None
            names |= part.reached(launch.kernel) - {launch.kernel}
        name = f"{run.name}_{bound}"
        kernels[_kernel_text(run, name, launches)] = None
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
        run.name, run.name, "triton", text, len(run.types) - 1, (), lines, (), num_counters(run)
    )


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


def _kernel_text(run: Run, name: str, launches: Sequence[PartLaunch]) -> str:
    """Return the kernel of one row bound: FIRST to LAST of the phases, for this program."""
    last = len(launches) - 1
    arguments = [f"a{i}" for i in range(len(run.types))]
    lines = [
        JIT,
        f"def {name}(",
        f"    {', '.join(arguments)}, T, S, R, P,",
        "    FIRST: tl.constexpr, LAST: tl.constexpr,",
        "):  # fmt: skip",
        "    program, programs = tl.program_id(0), tl.num_programs(0)",
        f"    flags = a{run.counters} + {_first_flag(run)}",
    ]
    for p, launch in enumerate(launches):
        extents = [x.replace("min(", "tl.minimum(") for x in launch.grid]
        lines += [f"    across_{p} = {extents[0]}", f"    items_{p} = across_{p}"]
        lines[-1] += f" * {extents[1]}" if len(extents) > 1 else ""
    for p, (launch, operands, source) in enumerate(zip(launches, run.operands, run.sources)):
        item = "item, 0" if len(launch.grid) == 1 else f"item % across_{p}, item // across_{p}"
        flag = f"flags + {LINE * (p - 1)}, items_{p - 1}" if p else "flags, 0"
        given = [*(arguments[i] for i in operands), "T, S, R, P", *launch.constexprs.values()]
        lines += [
            f"    if FIRST <= {p} and LAST > {p}:  # {source.symbol}",
            "        item = program",
            f"        while item < items_{p}:  # in a `for` Triton would pipeline no inner loop",
            f"            {launch.kernel}_phase(",
            f"                {item}, across_{p}, item == program, {flag}, FIRST < {p},",
            f"                {', '.join(given)},",
            "            )",
            "            item += programs",
        ]
        done = f"ended(flags + {LINE * p}, program, programs, items_{p})"
        if p == 0 and "wait_for_inputs" in run.sources[0].text:
            lines += [
                "        if program >= items_0:  # its flags may be those of the launch before",
                "            wait_for_inputs()",
            ]
        if p < last:
            lines += [f"        if LAST > {p + 1}:", f"            if program < items_{p}:"]
            lines += [f"                {done}"]
    lines += [
        f"    if FIRST < {last} and LAST > {last}:",
        f"        if program < items_{last}:",
        f"            if {done} == items_{last}:  # every wait is over",
        f"                flag = tl.arange(0, {1 << last.bit_length()})",
        f"                tl.store(flags + flag * {LINE}, 0, mask=flag < {last + 1})",
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
