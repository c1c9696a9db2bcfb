"""The compiled program: launches on buffers, as plain data. Torch-free; stored as program.json.

A function (the outer graph, or a region) is a list of phases; the kernels of a phase run side by
side and a barrier follows. Regions are called with rows of an argument table, so that the program's
size does not grow with depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aios_compile.codegen.operand import Dim, SizeExpr, dim_text
from aios_compile.codegen.source import Candidate

# packet, results: what a step on a GPU is sent and gives back, see codegen/step_packet.py
Space = Literal[
    "arena", "argument", "weight", "state", "input", "counters", "packet", "results"
]  # fmt: skip


@dataclass(frozen=True)
class Ref:
    """Where an operand lies: `index` is a byte offset (arena) or a table index (all others);
    `shift` is added in bytes (a view's offset)."""

    space: Space
    index: int
    shift: Dim = 0

    def text(self) -> str:
        """Return the operand's address as C text inside a generated function."""
        base = {
            "arena": f"r->arena + {self.index}",
            "argument": f"a[{self.index}]",
            "weight": f"r->weights[{self.index}]",
            "state": f"r->states[{self.index}]",
            "input": f"r->inputs[{self.index}]",
        }.get(self.space, "nullptr")  # no C++ kernel has counters, packet or results
        return base if self.shift == 0 else f"{base} + {dim_text(self.shift, 'r->n.')}"


@dataclass(frozen=True)
class Launch:
    """One kernel call: index into Program.kernels, operands (inputs, outputs, workspace), phase."""

    kernel: int
    operands: tuple[Ref, ...]
    phase: int
    label: str


@dataclass(frozen=True)
class RegionCall:
    """`count` calls of a region with the rows first.. of its argument table; a phase of its own."""

    region: str
    first: int
    count: int
    phase: int


@dataclass(frozen=True)
class Function:
    """The launches of one graph. `rows` is the argument table of a region (empty for the root)."""

    name: str
    items: tuple[Launch | RegionCall, ...]
    rows: tuple[tuple[Ref, ...], ...] = ()


@dataclass(frozen=True)
class Kernel:
    """What is kept of a generated kernel besides its text."""

    name: str
    symbol: str
    digest: str
    model_lines: tuple[str, ...]
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class WeightEntry:
    """One tensor of weights.bin: `name` is unique; `packed` names its layout ("" = row-major)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    packed: str
    recipe: str


@dataclass(frozen=True)
class TensorEntry:
    """A runtime input or an output: dtype and shape in named sizes; arena offset of an output."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    offset: int = -1


@dataclass(frozen=True)
class StateEntry:
    """A KV cache of one layer: `page_shape` without the leading page count."""

    name: str
    dtype: str
    page_shape: tuple[int, ...]


@dataclass(frozen=True)
class BufferRow:
    """One buffer of the memory plan: lifetime in phases of its function."""

    name: str
    bytes: int
    offset: int
    first: int
    last: int


@dataclass(frozen=True)
class MemoryPlan:
    """The arena. lower_bound_bytes: the most bytes alive at once; naive_bytes: no sharing."""

    arena_bytes: int
    naive_bytes: int
    lower_bound_bytes: int
    buffers: tuple[BufferRow, ...]


@dataclass(frozen=True)
class Program:
    """Everything that the executor needs, besides the library and the weights' bytes.

    counters: 32-bit integers that are zero before and after each launch; all launches share them.
    """

    kernels: tuple[Kernel, ...]
    functions: tuple[Function, ...]
    weights: tuple[WeightEntry, ...]
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    states: tuple[StateEntry, ...]
    plan: MemoryPlan
    sizes: dict[str, int]
    num_launches: int
    settings: dict[str, Any]
    counters: int = 0

    def to_json(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Program:
        return Program(
            tuple(_kernel(k) for k in data["kernels"]),
            tuple(_function(f) for f in data["functions"]),
            tuple(_build(WeightEntry, w) for w in data["weights"]),
            tuple(_build(TensorEntry, t) for t in data["inputs"]),
            tuple(_build(TensorEntry, t) for t in data["outputs"]),
            tuple(_build(StateEntry, s) for s in data["states"]),
            plan_from_json(data["plan"]),
            dict(data["sizes"]),
            int(data["num_launches"]),
            dict(data["settings"]),
            int(data.get("counters", 0)),
        )

    def function(self, name: str) -> Function:
        return next(f for f in self.functions if f.name == name)


def plan_from_json(data: Mapping[str, Any]) -> MemoryPlan:
    rows = tuple(_build(BufferRow, b) for b in data["buffers"])
    return MemoryPlan(data["arena_bytes"], data["naive_bytes"], data["lower_bound_bytes"], rows)


def _plain(value: Any) -> Any:
    if isinstance(value, SizeExpr):
        return {"terms": [[list(f), c] for f, c in value.terms]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return fields
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _value(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"terms"}:
        return SizeExpr(tuple((tuple(f), int(c)) for f, c in value["terms"]))
    if isinstance(value, list):
        return tuple(_value(v) for v in value)
    return value


def _build(kind: Any, data: Mapping[str, Any]) -> Any:
    return kind(**{key: _value(value) for key, value in data.items()})


def _kernel(data: Mapping[str, Any]) -> Kernel:
    candidates = tuple(Candidate(**c) for c in data.get("candidates", ()))
    return _build(Kernel, {**data, "candidates": candidates})  # type: ignore[no-any-return]


def _function(data: Mapping[str, Any]) -> Function:
    items: list[Launch | RegionCall] = []
    for item in data["items"]:
        if "region" in item:
            items.append(_build(RegionCall, item))
        else:
            operands = tuple(_build(Ref, ref) for ref in item["operands"])
            items.append(Launch(item["kernel"], operands, item["phase"], item["label"]))
    rows = tuple(tuple(_build(Ref, ref) for ref in row) for row in data["rows"])
    return Function(data["name"], tuple(items), rows)
