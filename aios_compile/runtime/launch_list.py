"""Flatten a program into its launches, one after another, on absolute places.

A C++ step calls a region in a loop over rows of arguments; a GPU is given every launch by itself,
so that a graph can be captured from them. The list does not depend on T: `offset` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aios_compile.codegen.operand import Dim, dim_value
from aios_compile.codegen.program import Launch, Program, Ref, RegionCall, Space


@dataclass(frozen=True)
class Place:
    """An operand: `space` and `index` as in program.Ref (never an argument), shifts in bytes."""

    space: Space
    index: int
    shifts: tuple[Dim, ...]

    def offset(self, sizes: Mapping[str, int]) -> int:
        """Return how many bytes the operand begins behind its buffer (arena: behind the arena)."""
        begin = self.index if self.space == "arena" else 0
        return begin + sum(dim_value(shift, sizes) for shift in self.shifts)


@dataclass(frozen=True)
class Call:
    """One launch: index into Program.kernels, its operands, and which call of which region."""

    kernel: int
    operands: tuple[Place, ...]
    label: str
    region: str = ""
    row: int = -1


def launch_list(program: Program) -> list[Call]:
    """Return the launches of one step, in order."""
    calls: list[Call] = []
    for item in program.function("step").items:
        if isinstance(item, RegionCall):
            function = program.function(item.region)
            for row in range(item.first, item.first + item.count):
                inner = [i for i in function.items if isinstance(i, Launch)]
                assert len(inner) == len(function.items), "regions do not nest"
                calls += [_call(i, item.region, row, function.rows[row]) for i in inner]
        else:
            calls.append(_call(item, "", -1, ()))
    return calls


def _call(item: Launch, region: str, row: int, arguments: tuple[Ref, ...]) -> Call:
    places = tuple(_place(ref, arguments) for ref in item.operands)
    return Call(item.kernel, places, item.label, region, row)


def _place(ref: Ref, arguments: tuple[Ref, ...]) -> Place:
    if ref.space != "argument":
        return Place(ref.space, ref.index, (ref.shift,))
    outer = arguments[ref.index]
    assert outer.space != "argument", "an argument is bound to a buffer"
    return Place(outer.space, outer.index, (outer.shift, ref.shift))


def launch_text(program: Program) -> str:
    """Return the launches of a step for people, one a line; a region's rows stand once."""
    lines = [f"# {program.num_launches} kernels a step"]
    for call in launch_list(program):
        if call.row <= 0:
            places = ", ".join(_text(program, place) for place in call.operands)
            where = f"{call.region}[*]." if call.region else ""
            lines.append(f"{where}{program.kernels[call.kernel].name}({places})")
    return "\n".join(lines) + "\n"


def _text(program: Program, place: Place) -> str:
    tables: dict[str, Sequence[Any]] = {
        "weight": program.weights,
        "state": program.states,
        "input": program.inputs,
    }
    if place.space in tables:
        return str(tables[place.space][place.index].name)
    shift = sum(s for s in place.shifts if isinstance(s, int))
    return f"{place.space}+{place.index + shift}" if place.space == "arena" else place.space
