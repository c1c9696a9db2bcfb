"""Forms of a kernel's launches that give the same bits: programs, stages, warps that no sum sees.

For kernels that no cost model chooses (attention, sampling): the standard form, or the one that the
GPU's ledger names, and beside a form that was not measured the others, for select_kernels to time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from aios_compile.codegen.source import Candidate
from aios_compile.codegen.triton.candidate_variants import ANY_TOKENS
from aios_compile.codegen.triton.choice import Tuning

Form = TypeVar("Form", covariant=True)


@dataclass(frozen=True)
class Forms(Generic[Form]):
    """What a range of rows runs, its name, and by name what may be timed in its place."""

    chosen: Form
    name: str
    others: Mapping[str, Form]


def choose(
    every: Mapping[str, Form], signature: str, most: int | None, tuning: Tuning | None
) -> Forms[Form]:
    """Return the form for up to `most` rows; the first of `every` is the standard one."""
    standard = next(iter(every))
    if tuning is None:
        return Forms(every[standard], standard, {})
    entry = None if tuning.ledger is None else tuning.ledger.entry(signature, most)
    if entry is not None and entry.choice in every:
        return Forms(every[entry.choice], entry.choice, {})
    rest = [name for name in every if name != standard][: tuning.timed]
    return Forms(every[standard], standard, {name: every[name] for name in rest})


def candidates(found: Sequence[Forms[Form]], signature: str) -> tuple[Candidate, ...]:
    """Return a module's candidates for select_kernels, each name once."""
    names = dict.fromkeys(name for forms in found for name in forms.others)
    return tuple(Candidate(name, signature, 1, ANY_TOKENS, name) for name in names)
