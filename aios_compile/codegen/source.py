"""What an emitter returns: the text of one kernel and what a caller must know to call it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from aios_compile.codegen.operand import Operand


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

    def digest(self) -> str:
        """Return the sha256 of language and text, in hex."""
        return hashlib.sha256(f"{self.language}\0{self.text}".encode()).hexdigest()
