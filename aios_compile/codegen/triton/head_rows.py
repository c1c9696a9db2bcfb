"""The module shared by rope, kv_write and their fusion with the q and k norms: rows of heads.

The specs are the C++ target's (codegen/cpp/head_rows.py has the formulas and layouts). Grid:
(tokens / BLOCK_T, query heads + key heads + value heads). Bytes a token: each head read once from
memory (the element that a rotation pairs with comes from the first-level cache), written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aios_compile.codegen.cpp.head_rows import LARGEST_CODE, Head, HeadRowsSpec, Write
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import Strided
from aios_compile.codegen.triton.cards import DEFAULT, Card
from aios_compile.codegen.triton.frame import python_dim
from aios_compile.codegen.triton.template import (
    Bound,
    Entry,
    fixed,
    is_fixed,
    kernel,
    next_power_of_two,
)
from aios_compile.ir.quantized import SMALLEST

Values = dict[str, Any]
BLOCK = 8  # tokens of a program
SCALES = ("KS_PAGE", "KS_HEAD", "VS_PAGE", "VS_HEAD")
SMALL = 32  # tokens up to which a program takes one: decode is bound by launches, not by lanes


def bind(spec: HeadRowsSpec | None, operands: Sequence[Operand]) -> Bound[HeadRowsSpec] | None:
    """Return the spec with its operands, None unless the template can serve it."""
    return Bound(spec, tuple(operands)) if spec is not None and serves(spec) else None


def serves(spec: HeadRowsSpec) -> bool:
    """Return whether every offset and stride is a number, as the template bakes them in."""
    views: list[Strided] = []
    for head in (spec.q, spec.k):
        views += [v for v in (head.source, head.weight) if v is not None] if head else []
    views += [spec.rotation.cos, spec.rotation.sin] if spec.rotation else []
    views += [spec.write.value, spec.write.slots, *spec.write.states] if spec.write else []
    out = spec.out[1].strides if spec.out else ()
    return is_fixed(*out) and all(is_fixed(v.offset, *v.operand.strides) for v in views)


def emit(bound: Bound[HeadRowsSpec], card: Card = DEFAULT) -> KernelSource:
    """Return the module for a card; the caches are updated in place."""
    spec = bound.spec
    source = (spec.q or spec.k).source  # type: ignore[union-attr]
    rows, values = source.operand.shape[0], constants(spec, card)
    tokens, heads = python_dim(rows), values["Q_HEADS"] + 2 * values["KV_HEADS"]
    arguments: tuple[int | str, ...] = (*names(spec).values(), tokens)
    one = Entry("head_rows", arguments, f"{tokens}, {heads}", (("BLOCK_T", 1),), num_warps=1)
    grid = f"({tokens} + {BLOCK - 1}) // {BLOCK}, {heads}"
    block = Entry("head_rows", arguments, grid, (("BLOCK_T", BLOCK),))
    return kernel(
        spec.name, bound, [f"{spec.name}: one program a head and a block of tokens"],
        bound.operands, values, [*code_templates(spec), "head_rows"],
        [(SMALL, [one]), (None, [block])], rows, inplace=inplace(spec), lines=spec.lines,
    )  # fmt: skip


def inplace(spec: HeadRowsSpec) -> tuple[tuple[int, int], ...]:
    """Return (output, input) of the caches, which are written in place."""
    if spec.write is None:
        return ()
    return tuple(
        (output - spec.num_inputs, state.index)
        for output, state in zip(spec.write.outputs, spec.write.states)
    )


def names(spec: HeadRowsSpec) -> dict[str, int]:
    """Return the operand of each pointer argument of the template; absent ones point anywhere."""
    found = dict.fromkeys(("q", "q_weight", "k", "k_weight", "v", "cos", "sin", "slots"), 0)
    for name, head in (("q", spec.q), ("k", spec.k)):
        if head is not None:
            found[name] = head.source.index
            found[f"{name}_weight"] = head.weight.index if head.weight else 0
    if spec.rotation is not None:
        found |= {"cos": spec.rotation.cos.index, "sin": spec.rotation.sin.index}
    if spec.write is not None:
        found |= {"v": spec.write.value.index, "slots": spec.write.slots.index}
    found["out"] = spec.out[0] if spec.out else 0
    states = ("k_cache", "v_cache", "k_scales", "v_scales")
    outputs = spec.write.outputs if spec.write else ()
    return found | dict.fromkeys(states, 0) | dict(zip(states, outputs))


def code_templates(spec: HeadRowsSpec) -> list[str]:
    """Return the templates that caches of e4m3 codes need before the others."""
    return ["e4m3"] if spec.write is not None and spec.write.dtype == "e4m3" else []


def constants(spec: HeadRowsSpec, card: Card) -> Values:
    """Return the template's constants."""
    source = (spec.q or spec.k).source.operand  # type: ignore[union-attr]
    width = fixed(source.shape[2])
    values: Values = {"D": width, "BLOCK_D": next_power_of_two(width)}
    values |= _head("Q", spec.q) | _head("K", spec.k)
    values["KV_HEADS"] = values.pop("K_HEADS")
    rotation = spec.rotation
    values["INTERLEAVED"] = bool(rotation and rotation.interleaved)
    rotated = fixed(rotation.cos.operand.shape[-1]) if rotation else 0
    for prefix, head in (("Q", spec.q), ("K", spec.k)):
        values[f"{prefix}_ROTATED"] = rotated if head is not None and head.rotated else 0
    for name, table in (("COS", rotation and rotation.cos), ("SIN", rotation and rotation.sin)):
        values |= _rows(name, table or None)
    out = spec.out[1] if spec.out else None
    while out is not None and len(out.shape) > 3:
        out = Operand(out.name, out.dtype, out.shape[1:], out.strides[1:])
    values["OUT_TOKEN"] = fixed(out.strides[0]) if out else 0
    values["OUT_HEAD"] = fixed(out.strides[1]) if out else 0
    return values | _write(spec.write) | _codes(spec.write, card)


def _rows(name: str, view: Strided | None) -> Values:
    """Return the offset and the token stride of an operand of one row a token."""
    return {
        f"{name}_OFFSET": fixed(view.offset) if view else 0,
        f"{name}_TOKEN": fixed(view.operand.strides[0]) if view else 0,
    }


def _head(prefix: str, head: Head | None) -> Values:
    source = head.source if head else None
    values = _rows(prefix, source)
    values[f"{prefix}_HEAD"] = fixed(source.operand.strides[1]) if source else 0
    values[f"{prefix}_HEADS"] = fixed(source.operand.shape[1]) if source else 0
    weight = head.weight if head else None
    values[f"{prefix}_WEIGHT"] = fixed(weight.offset) if weight else 0
    values[f"{prefix}_WEIGHTED"] = weight is not None
    values[f"{prefix}_NORM"] = bool(head and head.eps is not None)
    values[f"{prefix}_EPS"] = float((head.eps if head else None) or 0.0)
    return values


def _write(write: Write | None) -> Values:
    if write is None:
        zeros = ("KC_PAGE", "KC_HEAD", "VC_PAGE", "VC_HEAD", "SLOT_OFFSET", "SLOT_TOKEN")
        return {**dict.fromkeys((*zeros, *SCALES), 0), **_rows("V", None), "V_HEAD": 0, "PAGE": 1,
                "DV": 1, "BLOCK_DV": 1, "IN_CODES": False, "SMALLEST": SMALLEST}  # fmt: skip
    k, v = write.k_cache.operand, write.v_cache.operand
    page, width = fixed(v.shape[2]), fixed(v.shape[3])
    values = {
        "KC_PAGE": fixed(k.strides[0]), "KC_HEAD": fixed(k.strides[1]),
        "VC_PAGE": fixed(v.strides[0]), "VC_HEAD": fixed(v.strides[1]),
        "PAGE": page, "DV": width, "BLOCK_DV": next_power_of_two(width),
        "V_HEAD": fixed(write.value.operand.strides[1]), "IN_CODES": write.in_codes,
        "SMALLEST": SMALLEST,
    }  # fmt: skip
    steps = [d for scales in write.states[2:] for d in scales.operand.strides[:2]]
    values |= dict.fromkeys(SCALES, 0) | dict(zip(SCALES, map(fixed, steps)))
    return values | _rows("SLOT", write.slots) | _rows("V", write.value)


def _codes(write: Write | None, card: Card) -> Values:
    """Return what kind of codes the caches hold, if they do."""
    if write is None or not write.in_codes:
        return {}
    return {
        "LARGEST_CODE": LARGEST_CODE[write.dtype],
        "FLOAT_CODES": write.dtype == "e4m3",
        "NATIVE_E4M3": card.fp8,
    }
