"""Split-K: several programs share the depth of a tile of a linear for few tokens.

Each part goes through every SPLIT-th step of k and writes its sums to the workspace; the one that
comes last (a counter a tile, at zero before and after) adds them in ascending order of the parts
and computes the tail, so the bits do not depend on who was last. Layout of the workspace: sums
[split, stream, token, column], then, where the parts of x are squared too, [split, tile, token].
The number of parts is the configuration's and never depends on T. Bytes: 8 a part and result, which
stay in L2. Source: stream-K's fixup (Osama et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aios_compile.codegen.naming import variable
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.triton.frame import python_dim
from aios_compile.codegen.triton.linear_spec import LinearSpec
from aios_compile.codegen.triton.linear_text import space_of

BEGIN = ("item = tl.program_id(0).to(tl.int64)",)
BEGIN_PART = (*BEGIN, "part = (item % SPLIT).to(tl.int32)", "item = item // SPLIT")


@dataclass(frozen=True)
class Shared:
    """How one variant shares its depth. tiles: of columns; tokens: of a tile, all of the step's.

    squares: whether a part knows only the squares of its own part of x.
    """

    split: int
    tiles: int
    tokens: int
    squares: bool

    def size(self, spec: LinearSpec) -> int:
        """Return the float32 numbers that the parts write."""
        sums = self.split * spec.streams * self.tokens * spec.columns
        return sums + (self.split * self.tokens * self.tiles if self.squares else 0)


def workspace(spec: LinearSpec, variants: Sequence[Shared]) -> list[Operand]:
    """Return the buffer for the parts' sums; none if no variant has parts."""
    sizes = [shared.size(spec) for shared in variants if shared.split > 1]
    return [Operand("partial", "f32", (max(sizes),), (1,))] if sizes else []


def counters(variants: Sequence[Shared]) -> int:
    """Return how many tiles have parts."""
    return max((shared.tiles for shared in variants if shared.split > 1), default=0)


def counter_operand(count: int) -> list[Operand]:
    """Return the operand of the counters, which comes last; none for none."""
    return [Operand("counters", "i32", (count,), (1,))] if count else []


def begin_lines(split: int) -> list[str]:
    """Return the lines that set `item`, the tile, and with parts `part` (constexpr SPLIT)."""
    return list(BEGIN_PART if split > 1 else BEGIN)


def steps(split: int, step: str) -> tuple[str, str]:
    """Return where a program's loop over the depth begins and how far it goes at once."""
    return (f"part * {step}", f"{step} * SPLIT") if split > 1 else ("0", step)


def finish_lines(
    spec: LinearSpec, operands: list[Operand], shared: Shared, tail: list[str]
) -> list[str]:
    """Return the lines from a program's sums (and `total`, its squares) through the tail.

    sum<stream> has the shape of i0 and i1 together, total that of i0.
    """
    if shared.split == 1:
        return tail
    lines = [*_combine(spec, operands, shared), *tail]
    return [*_share(spec, operands, shared), *(f"    {line}" for line in lines)]


def _places(spec: LinearSpec, operands: list[Operand], shared: Shared) -> dict[str, str]:
    """Return where the first part keeps its sums and its squares."""
    index = space_of(operands, "partial")
    rows = python_dim(spec.x.operand.shape[0])
    base, cells = variable(operands[index], index), f"{rows} * {spec.columns}"
    found = {}
    for s in range(spec.streams):
        found[f"sum{s}"] = f"{base} + ({s} * {rows} + i0) * {spec.columns} + i1"
    if shared.squares:
        squares = f"{shared.split * spec.streams} * {cells}"
        found["total"] = f"{base} + {squares} + item * {rows} + i0"
    return found


def _steps(spec: LinearSpec, shared: Shared) -> dict[str, str]:
    """Return how far a part's values are behind those of the part before."""
    rows = python_dim(spec.x.operand.shape[0])
    step = f"{spec.streams} * {rows} * {spec.columns}"
    found = {f"sum{s}": step for s in range(spec.streams)}
    return found | ({"total": f"{shared.tiles} * {rows}"} if shared.squares else {})


def _share(spec: LinearSpec, operands: list[Operand], shared: Shared) -> list[str]:
    """Return the lines that keep a part's sums and ask whether all parts of the tile are there."""
    index, places, lines = space_of(operands, "counters"), _places(spec, operands, shared), []
    for name, step in _steps(spec, shared).items():
        mask = "mask0" if name == "total" else "mask0 & mask1"
        lines.append(f"tl.store({places[name]} + part * ({step}), {name}, mask={mask})")
    lines += ["tl.debug_barrier()  # every thread's sums are written before the tile says so"]
    lines += [f"counter = {variable(operands[index], index)} + item"]
    return [*lines, 'if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:']


def _combine(spec: LinearSpec, operands: list[Operand], shared: Shared) -> list[str]:
    """Return the lines that add the parts' sums, past the first-level cache."""
    places, lines = _places(spec, operands, shared), ["tl.store(counter, 0)"]
    for name, step in _steps(spec, shared).items():
        mask = "mask0" if name == "total" else "mask0 & mask1"
        load = f'mask={mask}, other=0.0, cache_modifier=".cg"'
        lines.append(f"{name} = tl.load({places[name]}, {load})")
        for part in range(1, shared.split):
            lines.append(f"{name} += tl.load({places[name]} + {part} * ({step}), {load})")
    return lines
