"""What an emitter returns: the text of one kernel, and what is needed to call it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from aios_compile.codegen.operand import Operand


@dataclass(frozen=True)
class Candidate:
    """Another way to compute what a kernel computes, to the bit: `<symbol>_<name>` (C++ only).

    type: the struct of codegen/cpp/tiles.h that it is compiled with. It can only be faster in steps
    of least to most tokens; elsewhere it is the same. what: in words.
    """

    name: str
    type: str
    least: int
    most: int
    what: str


@dataclass(frozen=True)
class KernelSource:
    """One generated kernel.

    `symbol` is the C (or Triton) function. Operands are the body's inputs in placeholder order,
    then its outputs. `inplace` lists (output index, input index) pairs that may share memory:
    the kernel reads and writes them at the same index only. `model_lines` are the model's source
    lines that the kernel computes, for people. `workspace`: buffers that a caller gives after the
    operands, with sizes in T, S, R, P; not in `num_operands`, dead after the launch.
    `counters`: 32-bit integers, zero before and after each launch, given last (Triton only).
    `finishes`: a second range of items runs behind a barrier: `<symbol>_finish` (C++ only).
    `candidates`: what select_kernels may choose in its place, number 1 first.
    `emitter`: the file of codegen/triton that made it (Triton only).
    """

    name: str
    symbol: str
    language: str
    text: str
    num_operands: int
    inplace: tuple[tuple[int, int], ...] = ()
    model_lines: tuple[str, ...] = ()
    workspace: tuple[Operand, ...] = ()
    counters: int = 0
    finishes: bool = False
    candidates: tuple[Candidate, ...] = ()
    emitter: str = ""

    def digest(self) -> str:
        """Return the sha256 of language and text, in hex."""
        return hashlib.sha256(f"{self.language}\0{self.text}".encode()).hexdigest()
