"""Examine a model without its weights and without running it: what would be compiled, and why.

Captures, runs the passes, emits and plans; counts memory, launches and the bytes of a decode step;
predicts tokens a second from the read bandwidth of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from aios_compile.codegen.artefact import TensorRecord
from aios_compile.codegen.cpp.step import num_barriers
from aios_compile.codegen.operand import BYTES
from aios_compile.codegen.program import Program
from aios_compile.compile_settings import capture_for, pass_options
from aios_compile.config import CompileOptions
from aios_compile.errors import AiosError, ConfigError
from aios_compile.passes.pipeline import STAGES
from aios_compile.study.ablation import Ablation, ablate
from aios_compile.study.kernel_table import KernelRow, kernel_rows
from aios_compile.study.memory_picture import bytes_text
from aios_compile.study.plan_model import Planned, open_without_weights, plan_model


@dataclass(frozen=True)
class Memory:
    """Bytes by owner. arena: scratch of a step of `tokens` tokens; kv_token: the cache of one token
    in all layers; kv_full: that of every sequence at its longest.
    """

    tokens: int
    sequences: int
    model_len: int
    weights: int
    arena: int
    kv_token: int

    @property
    def kv_full(self) -> int:
        return self.kv_token * self.model_len * self.sequences

    @property
    def total(self) -> int:
        return self.weights + self.arena + self.kv_full


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found. `refused` is why the model does not compile or generate, or ""."""

    model: str
    hits: Mapping[str, int] = field(default_factory=dict)
    kernels: tuple[KernelRow, ...] = ()
    near_misses: tuple[tuple[str, str], ...] = ()
    refused: str = ""
    launches: int = 0
    barriers: int = 0
    memory: Memory | None = None
    memory_doubled: Memory | None = None
    context: int = 0
    bandwidth: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def floor_bytes(self) -> int:
        """Return the bytes that a token must read: each weight and cached key and value once."""
        return sum(row.weight_bytes + row.kv_bytes for row in self.kernels)

    @property
    def tokens_per_second(self) -> float:
        """Return the roofline: no decode at batch 1 is quicker than reading these bytes."""
        return self.bandwidth / self.floor_bytes if self.floor_bytes else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON values."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found["floor_bytes_a_token"] = self.floor_bytes
        found["predicted_tokens_per_second"] = self.tokens_per_second
        for name in ("memory", "memory_doubled"):
            memory = found[name]
            if memory is not None:
                values = {n: getattr(memory, n) for n in memory.__dataclass_fields__}
                found[name] = {**values, "kv_full": memory.kv_full, "total": memory.total}
        return found

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def examine(
    model: str | nn.Module, options: CompileOptions, *, context: int = 256, bandwidth: float = 0.0
) -> Diagnosis:
    """Examine a folder, config.json, hub id, GGUF file or module.

    context: tokens in the cache. bandwidth: bytes a second that memory can be read with. What the
    compiler refuses becomes part of the diagnosis; what is no model at all raises CheckpointError.
    """
    source = open_without_weights(model, options)
    try:
        planned = plan_model(source, options)
    except ConfigError:
        raise
    except AiosError as error:
        return Diagnosis(source.name, refused=str(error), bandwidth=bandwidth)
    program = planned.program
    tokens = program.sizes["T"]
    rows = kernel_rows(planned.module, planned.emitted, program, context)
    return Diagnosis(
        source.name,
        hits={r.name: r.hits if r.kept else 0 for r in planned.results},
        kernels=tuple(rows),
        near_misses=tuple((r.name, text) for r in planned.results for text in r.refusals),
        refused=planned.module.not_generatable,
        launches=program.num_launches,
        barriers=num_barriers(program),
        memory=_memory(program),
        memory_doubled=_memory(planned.with_tokens(2 * tokens)),
        context=context,
        bandwidth=bandwidth,
        notes=(*source.notes, *_lost(planned)),
    )


def savings(model: str | nn.Module, options: CompileOptions, *, context: int = 256) -> Ablation:
    """Count what each optional pass saves: launches and bytes of a decode step without it."""
    source = open_without_weights(model, options)
    sizes = options.resolve_sizes(source.max_model_len)
    module = source.build()
    captured = capture_for(module, source, sizes)
    passes = pass_options(options, sizes, module)
    return ablate(captured, STAGES, passes, context=context)


def _lost(planned: Planned) -> list[str]:
    return [f"{r.name} was not kept: {r.reason}" for r in planned.results if not r.kept]


def _memory(program: Program) -> Memory:
    settings = program.settings
    states = sum(math.prod(s.page_shape) * BYTES[s.dtype] for s in program.states)
    return Memory(
        tokens=program.sizes["T"],
        sequences=program.sizes["S"],
        model_len=settings["max_model_len"],
        weights=sum(TensorRecord(w.name, w.dtype, w.shape, 0).num_bytes for w in program.weights),
        arena=program.plan.arena_bytes,
        kv_token=states // settings["page_size"],
    )


def differences(diagnosis: Diagnosis, expected: Mapping[str, Any]) -> list[str]:
    """Compare with pinned counts (see `pinned`); return a line for each that differs.

    Counts that the file does not name are not compared. Raises ConfigError for an unknown name.
    """
    found = pinned(diagnosis)
    lines = []
    for name, count in expected.items():
        if name not in found:
            known = ", ".join(found)
            raise ConfigError(f"{name!r} is no count of the doctor", advice=f"there are {known}")
        if found[name] != count:
            lines.append(f"{name}: {found[name]}, expected {count}")
    return lines


def why(diagnosis: Diagnosis, text: str) -> list[str]:
    """Return, for every op with `text` in its name or module path, or "file.py:12" in its model
    lines, the kernel that computes it, what else is in there, and why passes left it alone.
    """
    lines = []
    for row in diagnosis.kernels:
        at_line = ":" in text and any(text in line for line in row.model_lines)
        for op, path in row.places:
            if not (at_line or text in path or text in op):
                continue
            others = [_named(*p) for p in row.places if p != (op, path)]
            with_them = f"with {', '.join(others)}" if others else "alone"
            lines.append(f"{_named(op, path)}: in {row.name}, {with_them}")
            reasons = [(n, t) for n, t in diagnosis.near_misses if path and f" ({path}, " in t]
            lines += [f"    {n}: {t.partition(f' ({path}, ')[0]}" for n, t in reasons]
            if not (others or reasons):
                lines.append("    no pass found a pattern near it")
    return lines


def _named(op: str, path: str) -> str:
    name = op.removeprefix("aios.").removeprefix("aten.").partition(".")[0]
    return f"{name} of {path}" if path else name


def pinned(diagnosis: Diagnosis) -> dict[str, int]:
    """Return what `--expect` can hold: rewrites a pass, kernels, launches, near misses."""
    counts = {
        "kernels": len(diagnosis.kernels),
        "launches": diagnosis.launches,
        "near_misses": len(diagnosis.near_misses),
    }
    return {**diagnosis.hits, **counts}


def _lines(d: Diagnosis) -> list[str]:
    lines = [d.model]
    if d.refused:
        lines += ["", f"REFUSED: {d.refused}"]
    if not d.kernels:
        return lines
    lines += ["", "fused and rewritten"]
    lines += [f"  {name:<32}{count:>4}" for name, count in d.hits.items() if count]
    lines += ["", "nearly, and why not"]
    lines += [f"  {name}: {text}" for name, text in d.near_misses] or ["  (nothing)"]
    lines += [
        "",
        f"{len(d.kernels)} kernels, {d.launches} launches and {d.barriers} barriers a step",
    ]
    head = f"  {'bytes a token':>14}  {'launches':>8}  kernel"
    lines += [f"a token reads and writes, with {d.context} tokens in the cache", head]
    width = max(len(row.name) for row in d.kernels)
    for row in d.kernels:
        line = row.model_lines[0] if row.model_lines else ""
        lines.append(f"  {row.bytes_a_token:>14,}  {row.launches:>8}  {row.name:<{width}} {line}")
    lines += ["", *_memory_lines(d)]
    if d.bandwidth:
        rate = f"{d.tokens_per_second:.1f} tokens/s at batch 1"
        lines += [
            "",
            f"at most {rate}: {bytes_text(d.floor_bytes)} of weights and cache must be read, "
            f"memory gives {d.bandwidth / 1e9:.1f} GB/s",
        ]
    return lines + [f"note: {note}" for note in d.notes]


def _memory_lines(d: Diagnosis) -> list[str]:
    a, b = d.memory, d.memory_doubled
    assert a is not None and b is not None
    sizes = [
        ("weights", a.weights, b.weights),
        ("arena (scratch of a step)", a.arena, b.arena),
        ("KV cache of one token", a.kv_token, b.kv_token),
        (f"KV cache, {a.sequences} x {a.model_len} tokens", a.kv_full, b.kv_full),
        ("together", a.total, b.total),
    ]
    lines = [f"{'memory':<36}{f'T = {a.tokens}':>14}{f'T = {b.tokens}':>14}"]
    return lines + [f"  {n:<34}{bytes_text(x):>14}{bytes_text(y):>14}" for n, x, y in sizes]
