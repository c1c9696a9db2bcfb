"""Group kernels between barriers: a kernel runs in the first phase after all that it depends on.

Why it pays: a barrier costs about a microsecond on two cores; independent kernels (embedding, the
RoPE tables) share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def form_phases(
    items: Sequence[Item], dependencies: Mapping[Item, Sequence[Item]], alone: Sequence[Item] = ()
) -> dict[Item, int]:
    """Return the phase of each item, in an order that respects `dependencies`.

    items: in execution order. alone: items that share no phase with any other (region calls): what
    comes before them in the order stays before, and what comes after stays after.
    """
    phases: dict[Item, int] = {}
    floor, highest = 0, -1
    solitary = set(alone)
    for item in items:
        earliest = max((phases[d] + 1 for d in dependencies[item] if d in phases), default=0)
        phase = max(earliest, floor)
        if item in solitary:
            phase = max(phase, highest + 1)
            floor = phase + 1
        phases[item] = phase
        highest = max(highest, phase)
    return phases
