"""What a phase of a persistent launch waits for: all items of the phase before, or one head's.

Attention of a key and value head needs the columns of the merged projection that are its own: its
queries, its key, its value. Such a pair of phases has a flag a head; an item of the linear raises
the flag of the head whose columns it has made, and attention to a head begins while the linear
still makes the others. Every other linear of a layer sums over all that the phase before has made
(heads, inner features), so each of its items needs every item before it: there one flag says all.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aios_compile.codegen.program import Ref
from aios_compile.codegen.triton.module_parts import ModuleParts, PartLaunch

CONSTANT = re.compile(r"tl\.constexpr\((\d+)\)$")
OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip
BYTES = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
ATTENDS = "_attend_split"  # the kernel whose second axis are the key and value heads
ONE_OF_QKV = (0, 2, 4)  # arguments of its template: q, k, v


@dataclass(frozen=True)
class Heads:
    """Columns of a merged projection: queries of every key and value head, then keys, then values.

    count: key and value heads. queries, keys, values: columns of one of them.
    """

    count: int
    queries: int
    keys: int
    values: int

    @property
    def begins(self) -> tuple[int, int, int]:
        """Return the first columns of queries, keys and values."""
        return 0, self.count * self.queries, self.count * (self.queries + self.keys)

    @property
    def columns(self) -> int:
        return self.count * (self.queries + self.keys + self.values)


@dataclass(frozen=True)
class Handover:
    """How the tiles of a linear are counted. width: columns of a tile; parts: items of a tile."""

    heads: Heads
    width: int
    parts: int

    def items(self) -> int:
        """Return the items that make what one head needs."""
        heads = self.heads
        return (heads.queries + heads.keys + heads.values) // self.width * self.parts

    def lines(self) -> list[str]:
        """Return the lines that set `head`, for which an item is, and `made_by`, the linear's item
        that it does: a head's columns one after the other, so that the first head is soon ready.
        """
        heads, items = self.heads, self.items()
        queries, keys, values = (x // self.width for x in (heads.queries, heads.keys, heads.values))
        _, first_key, first_value = (x // self.width for x in heads.begins)
        value = f"{first_value - queries - keys} + head * {values} + tile"
        key = f"{first_key - queries} + head * {keys} + tile"
        return [
            f"head, tile = item // {items}, item % {items} // {self.parts}",
            f"made_by = tl.where(tile < {queries + keys}, {key}, {value})",
            f"made_by = tl.where(tile < {queries}, head * {queries} + tile, made_by)",
            f"made_by = made_by * {self.parts} + item % {self.parts}",
        ]


def heads_between(
    producer: ModuleParts,
    consumer: ModuleParts,
    produced: Sequence[Ref],
    consumed: Sequence[Ref],
) -> Heads | None:
    """Return the heads by which two phases can hand over, None where an item needs all.

    produced, consumed: where their operands are. The linear's only result must be q, k and v, in
    this order and dense, and nothing else that attention touches may be the linear's.
    """
    kernel = next((n for n in consumer.definitions if n.endswith(ATTENDS)), "")
    if "linear" not in producer.source.name or not kernel:
        return None
    given = _arguments(consumer.definitions[kernel])
    read = [consumed[given[i]] for i in ONE_OF_QKV]
    out = produced[producer.source.num_operands - 1]
    own = {ref for ref in produced if ref.space in ("arena", "argument")}
    others = {ref for i, ref in enumerate(consumed) if i not in {given[j] for j in ONE_OF_QKV}}
    if {(r.space, r.index) for r in read} != {(out.space, out.index)} or own & others:
        return None
    size = BYTES.get(consumer.types[given[0]], 0)
    values = {n: _constant(consumer, n) for n in ("KV_HEADS", "GROUP", "D", "DV", "Q_TOKEN")}
    heads = Heads(
        values["KV_HEADS"], values["GROUP"] * values["D"], values["D"], values["DV"]
    )  # fmt: skip
    steps = [_constant(consumer, n) for n in ("Q_HEAD", "K_HEAD", "V_HEAD")]
    offsets = [_constant(consumer, f"{n}_OFFSET") for n in "QKV"]
    starts = [
        r.shift // size + offset if size and isinstance(r.shift, int) else -1
        for r, offset in zip(read, offsets)
    ]
    dense = steps == [heads.keys, heads.keys, heads.values] and values["Q_TOKEN"] == heads.columns
    return heads if dense and tuple(starts) == heads.begins else None


def handover(heads: Heads | None, launch: PartLaunch) -> Handover | None:
    """Return how a linear's launch hands its heads over, None if a tile has columns of two."""
    width = int(launch.constexprs.get("BLOCK_N", 0))
    if heads is None or width == 0 or len(launch.grid) != 1:
        return None
    if math.gcd(heads.queries, heads.keys, heads.values) % width:
        return None
    parts = int(launch.constexprs.get("SPLIT", 1))
    items = _whole(ast.parse(launch.grid[0], mode="eval").body)
    return Handover(heads, width, parts) if items == heads.columns // width * parts else None


def _whole(node: ast.expr) -> int | None:
    """Return the value of an expression of whole numbers, None where it has a size."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _whole(node.left), _whole(node.right)
        return None if left is None or right is None else OPERATORS[type(node.op)](left, right)
    found = node.value if isinstance(node, ast.Constant) else None
    return found if isinstance(found, int) else None


def _arguments(kernel: str) -> list[int]:
    """Return the operand of each argument of the one call that a kernel of a template makes."""
    function = ast.parse(kernel).body[0]
    assert isinstance(function, ast.FunctionDef)
    places = {a.arg: i for i, a in enumerate(function.args.args)}
    call = next(n for n in ast.walk(function.body[-1]) if isinstance(n, ast.Call))
    return [places[a.id] for a in call.args[:5] if isinstance(a, ast.Name)]


def _constant(part: ModuleParts, name: str) -> int:
    """Return a whole constant of a module, -1 if it has none of that name."""
    found = CONSTANT.search(part.definitions.get(name, ""))
    return int(found[1]) if found else -1
