"""Texts of a persistent launch's module that are the same for every layer; see persistent.py."""

from __future__ import annotations

from aios_compile.codegen.triton.frame import LAUNCH

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
def made(flag):
    # Say that an item that a part of the next phase waits for has ended.
    tl.debug_barrier()  # every thread's results are written before the flag says so
    tl.atomic_add(flag, 1, sem="acq_rel")


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
