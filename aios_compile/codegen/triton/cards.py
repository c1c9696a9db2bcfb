"""What the cost model knows of a GPU: nominal numbers of one card for each target.

Bandwidth and peak: H200 as measured (4.3 TB/s copy, 790 TFLOP/s bf16); the others 85 % of the bytes
and 75 % of the dense bf16 operations in the vendors' data sheets (A100 SXM 80 GB, B200, MI300X).
"""

from __future__ import annotations

from dataclasses import dataclass

from aios_compile.errors import CodegenError

LAUNCH_US = 1.3  # a kernel in a CUDA graph on Hopper
GB = 10**9
LATENCY_US = 0.7  # from a load to its data, and as much again to start a program


@dataclass(frozen=True)
class Card:
    """One GPU. Bytes and operations a microsecond; shared memory and registers a multiprocessor;
    `memory_bytes` of the whole card.

    `sums`: float32 sums of a tile that a thread holds without spilling, tail included.
    `dependent_launch`: a kernel may start before the one before it has ended (dependent_launch.py).
    `async_dots`: whether the tensor cores read their factors from shared memory (wgmma, tcgen05).
    `fp8`: whether they multiply e4m3 numbers (OCP's).
    `warps`: that a streaming kernel's program may have; the phases of one launch share a number.
    `loads`: of 16 bytes of a block that a thread holds without spilling, of 8 warps or two streams.
    """

    target: str
    name: str
    processors: int
    bytes_per_us: float
    flops_per_us: float
    shared_bytes: int
    sums: int
    async_dots: bool
    memory_bytes: int
    registers: int = 65536
    threads: int = 2048
    warp: int = 32
    dependent_launch: bool = False
    fp8: bool = False
    warps: tuple[int, ...] = (2, 4, 8)
    loads: int = 4

    def processor_bytes_per_us(self) -> float:
        """Return what one multiprocessor can draw when the others idle: twice its share."""
        return 2 * self.bytes_per_us / self.processors


CARDS = {
    card.target: card
    for card in (
        Card("cuda:80", "A100", 108, 1.73e6, 234e6, 164 << 10, 64, False, 80 * GB),
        Card(
            "cuda:90", "H200", 132, 4.3e6, 790e6, 228 << 10, 128, True, 141 * GB,
            dependent_launch=True, fp8=True,
        ),
        Card(
            "cuda:100", "B200", 148, 6.8e6, 1690e6, 228 << 10, 64, True, 180 * GB,
            dependent_launch=True, fp8=True, loads=2,
        ),
        Card(
            "hip:gfx942", "MI300X", 304, 4.5e6, 980e6, 64 << 10, 64, False, 192 * GB,
            registers=131072, threads=2048, warp=64,
        ),
    )
}  # fmt: skip
DEFAULT = CARDS["cuda:90"]


def card_of(target: str) -> Card:
    """Return the card of a target. Raises CodegenError for a target that the model lacks."""
    if target not in CARDS:
        raise CodegenError(
            f"no cost model for GPU target {target!r}", advice=f"known: {', '.join(CARDS)}"
        )
    return CARDS[target]
