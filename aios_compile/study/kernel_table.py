"""The kernels of a program as rows for people: what each reads, and from which model line.

`kernel_rows` counts them from level 3 when a model is compiled; the rows are kept in the artefact,
so that reading them needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_compile.codegen.emit_kernels import Emitted
    from aios_compile.codegen.program import Program
    from aios_compile.ir.module import IRModule

KERNEL_TABLE = "kernels.json"
CONTEXT_TOKENS = 256  # in the cache, for the bytes that attention reads


@dataclass(frozen=True)
class KernelRow:
    """One generated kernel of a decode step (one sequence, one token).

    launches: in one step, all layers. weight_bytes, kv_bytes, activation_bytes: read and written in
    one step, all launches together. phases: "layer 2" where the step runs it. model_lines: what it
    computes, first what reads most of its bytes. computes: the ops of its body. places: the op and
    the module path of each.
    """

    name: str
    symbol: str
    launches: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    phases: tuple[str, ...]
    model_lines: tuple[str, ...]
    computes: tuple[str, ...] = ()
    places: tuple[tuple[str, str], ...] = ()

    @property
    def bytes_a_token(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return {**asdict(self), "bytes_a_token": self.bytes_a_token}

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> KernelRow:
        """Read a row that as_dict wrote."""
        names = [f.name for f in fields(KernelRow)]
        lists = ("phases", "model_lines", "computes")
        values: dict[str, Any] = {n: tuple(row[n]) if n in lists else row[n] for n in names}
        values["places"] = tuple((op, path) for op, path in row["places"])
        return KernelRow(**values)


def kernel_rows(
    module: IRModule, emitted: Emitted, program: Program, context: int = CONTEXT_TOKENS
) -> list[KernelRow]:
    """Return a row for each kernel, the one that moves the most bytes first."""
    from aios_compile.codegen.program import Launch
    from aios_compile.ir import provenance, snapshot
    from aios_compile.ir.module import body_of
    from aios_compile.study.traffic import Traffic, call_costs, main_reader

    traffic = {i: Traffic() for i in range(len(emitted.sources))}
    launches = dict.fromkeys(traffic, 0)
    computes: dict[int, tuple[str, ...]] = {}
    places: dict[int, tuple[tuple[str, str], ...]] = {}
    first: dict[int, tuple[str, ...]] = {}  # the line of what reads the most bytes
    joined = {gm.graph: emitted.joined.get(name) for name, gm in module.regions().items()}
    for cost in call_costs(module, context):
        run = joined.get(cost.call.graph)  # the persistent launch that the kernel is a phase of
        index = emitted.by_call[cost.call] if run is None else run
        traffic[index] += cost.traffic * cost.times
        launches[index] += cost.times
        reader = main_reader(module, cost)
        if reader is not None:
            first.setdefault(index, provenance.source_lines(reader)[:1])
        nodes = [n for n in body_of(cost.call).graph.nodes if _computes(n)]
        ops = [snapshot.target_name(n) for n in nodes]
        paths = zip(ops, map(provenance.module_path, nodes))
        computes[index] = tuple(dict.fromkeys((*computes.get(index, ()), *ops)))
        places[index] = tuple(dict.fromkeys((*places.get(index, ()), *paths)))
    for item in program.function("step").items:  # the kernels around a step, which no call makes
        if isinstance(item, Launch) and item.kernel not in emitted.by_call.values():
            launches[item.kernel] += 1
    for name, index in emitted.joined.items():  # once a call of the region, not once a phase
        launches[index] = len(program.function(name).rows)
    phases = _phases(program)
    rows = [
        KernelRow(
            source.name,
            source.symbol,
            launches[i],
            traffic[i].weights,
            traffic[i].kv,
            traffic[i].activations,
            phases.get(i, ()),
            tuple(dict.fromkeys((*first.get(i, ()), *source.model_lines))),
            computes.get(i, ()),
            places.get(i, ()),
        )
        for i, source in enumerate(emitted.sources)
    ]
    return sorted(rows, key=lambda row: -row.bytes_a_token)


def _computes(node: Any) -> bool:
    return node.op == "call_function" and "getitem" not in str(node.target)


def _phases(program: Program) -> dict[int, tuple[str, ...]]:
    """Return where each kernel runs: the name of its function and the number of the phase."""
    found: dict[int, dict[str, None]] = {}
    for function in program.functions:
        for item in function.items:
            kernel = getattr(item, "kernel", None)
            if kernel is not None:
                found.setdefault(kernel, {})[f"{function.name} {item.phase}"] = None
    return {kernel: tuple(names) for kernel, names in found.items()}


def total_bytes(rows: Iterable[KernelRow]) -> int:
    """Return the bytes a token of all kernels."""
    return sum(row.bytes_a_token for row in rows)
