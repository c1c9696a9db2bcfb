"""How many programs a multiprocessor holds at once, from what the compiler says that they use.

CUDA: registers are given to a warp in lots of 256, shared memory to a program in lots of 128 bytes
and 1024 bytes more for the system (sm_80 on), at most 32 programs (CUDA C++ Programming Guide,
compute capabilities; the arithmetic is that of NVIDIA's occupancy calculator). AMD: a unit has four
SIMDs, each with 512 vector registers a lane given in lots of eight and at most eight waves (CDNA 3
ISA guide, 2023), and its shared memory without a reserve.
"""

from __future__ import annotations

from dataclasses import dataclass

from aios_compile.codegen.triton.cards import Card

WARP_REGISTERS = 256  # a warp gets whole lots of them
SHARED_LOT, SHARED_RESERVE = 128, 1024
MOST_PROGRAMS = 32
WAVE_REGISTERS, SIMDS, SIMD_WAVES, WAVE_LOT = 512, 4, 8, 8


@dataclass(frozen=True)
class Usage:
    """What one program uses: registers a thread, bytes of shared memory and of spills, warps."""

    registers: int
    shared_bytes: int
    num_warps: int
    spill_bytes: int = 0


@dataclass(frozen=True)
class Occupancy:
    """Programs that a multiprocessor holds, and what allows no more."""

    programs: int
    limit: str


def occupancy(usage: Usage, card: Card) -> Occupancy:
    """Return how many programs fit; none if one does not."""
    warps = usage.num_warps
    if card.warp == 32:
        lot = -(-usage.registers * card.warp // WARP_REGISTERS) * WARP_REGISTERS
        registers = card.registers // lot // warps if usage.registers else MOST_PROGRAMS
        shared = -(-usage.shared_bytes // SHARED_LOT) * SHARED_LOT + SHARED_RESERVE
    else:
        each = -(-max(1, usage.registers) // WAVE_LOT) * WAVE_LOT
        registers = min(SIMD_WAVES, WAVE_REGISTERS // each) * SIMDS // warps
        shared = max(1, usage.shared_bytes)
    limits = {
        "registers": registers,
        "shared memory": card.shared_bytes // shared,
        "threads": card.threads // (warps * card.warp),
        "programs": MOST_PROGRAMS,
    }
    name = min(limits, key=lambda n: limits[n])
    return Occupancy(limits[name], name)
