"""Attention that finishes its own queries and writes its own keys and values: one launch at decode.

out = attention of rope(norm(q)) over the pages, after caches[slots] = rope(norm(k)), v. Up to
NEW_TOKENS tokens the unit that attends to a segment of keys first writes the step's keys of that
segment; beyond, where prompts would share many new keys between blocks of queries, a launch before
writes them all. A block of queries is finished in registers in both, so q is read once and never
written. The same functions as head_rows.py and paged_attention.py, so the same bits. Bytes: those
of paged_attention.py and of the heads, less q once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.codegen.access import outputs
from aios_compile.codegen.cpp import head_rows as heads
from aios_compile.codegen.cpp import paged_attention as attention
from aios_compile.codegen.cpp.head_rows import HeadRowsSpec, Write
from aios_compile.codegen.cpp.paged_attention import PagedAttentionSpec
from aios_compile.codegen.cpp.qk_norm_rope_kv_write import WRITES, head_of
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import body_lines, resolve
from aios_compile.codegen.triton import head_rows, paged_attention
from aios_compile.codegen.triton.cards import DEFAULT, Card
from aios_compile.codegen.triton.choice import Tuning
from aios_compile.codegen.triton.frame import python_dim
from aios_compile.codegen.triton.launch_forms import choose
from aios_compile.codegen.triton.template import Bound, Entry, kernel

aios = torch.ops.aios
NEW_TOKENS = 32  # as many as the linears of a decode step serve in one launch
STATES = ("k_cache", "v_cache", "k_scales", "v_scales")
NEW_ROWS, NEW_FLOAT_CODES = 8, 4  # keys that a unit writes at once: with 8, e4m3 spills on sm_90

Pair = tuple[HeadRowsSpec, PagedAttentionSpec]


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> Bound[Pair] | None:
    """Return the specs of a body of a kv_write and the attention that reads it, else None."""
    writes = [node for node in body.graph.nodes if node.target in WRITES]
    reads = body.graph.find_nodes(op="call_function", target=aios.paged_attention.default)
    if len(writes) != 1 or len(reads) != 1:
        return None
    places = _results(outputs(body), writes[0], reads[0])
    if places is None:
        return None
    rows = _rows(body, operands, writes[0], reads[0], places)
    if rows is None or rows.q is None or rows.write is None:
        return None
    known = {"q": rows.q.source, **dict(zip(STATES, rows.write.states))}
    out = operands[rows.num_inputs + places[-1]]
    attends = attention.spec_at(reads[0], operands, known, out)
    if attends is None or not (heads.fits(rows) and head_rows.serves(rows)):
        return None
    return Bound((rows, attends), tuple(operands)) if paged_attention.serves(attends) else None


def _results(results: list[fx.Node], write: fx.Node, read: fx.Node) -> tuple[int, ...] | None:
    """Return which outputs are the states and the attention's, None when there are others."""
    found: dict[Any, int] = {}
    for i, node in enumerate(results):
        item = node.target is operator.getitem and node.args[0] is write
        found[node.args[1] if item else node] = i
    keys = (*range(len(write.meta["val"])), read)
    if len(results) != len(keys) or any(key not in found for key in keys):
        return None
    return tuple(found[key] for key in keys)


def _rows(
    body: fx.GraphModule,
    operands: Sequence[Operand],
    write: fx.Node,
    read: fx.Node,
    places: tuple[int, ...],
) -> HeadRowsSpec | None:
    """Return what is done to the heads of q, k and v; q goes to no operand."""
    k_value, v_value, *rest = write.args
    q, k = head_of(read.args[0], operands), head_of(k_value, operands)
    v = heads.three_dimensional(resolve(v_value, operands))
    *states, slots = (resolve(r, operands) for r in rest)
    held = tuple(state for state in states if state is not None)
    if not (q and k and v and slots) or len(held) != len(states):
        return None
    rotations = {rotation for _, rotation in (q, k) if rotation is not None}
    if len(rotations) > 1:
        return None
    inputs = len(operands) - len(places)
    return HeadRowsSpec(
        "kv_write_attention", q[0], None, k[0],
        Write(v, slots, held, tuple(inputs + place for place in places[:-1])),
        rotations.pop() if rotations else None, len(operands), inputs, body_lines(body),
    )  # fmt: skip


def reference(spec: Bound[Pair], body: fx.GraphModule, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Compute the outputs in eager PyTorch: the body itself is the definition of correct."""
    return tuple(body(*tensors))


def emit(bound: Bound[Pair], card: Card = DEFAULT, tuning: Tuning | None = None) -> KernelSource:
    """Return the module for a card; the caches are updated in place.

    tuning: see launch_forms.choose.
    """
    rows, spec = bound.spec
    names, tokens = head_rows.names(rows), spec.inputs[0].operand.shape[0]
    order = ("q", "q_weight", "k", "k_weight", "v", "cos", "sin", "slots")
    caches = rows.write.outputs if rows.write else ()
    heads_of = [names[name] for name in order]
    fused, whole = paged_attention.entries(spec, heads_of, caches, card, writes=True)
    split, _ = paged_attention.entries(spec, heads_of, caches, card)
    at_once = NEW_FLOAT_CODES if paged_attention.floats_in_codes(spec) else NEW_ROWS
    most, values = paged_attention.split_tokens(spec), head_rows.constants(rows, card)
    values |= {**paged_attention.constants(spec, card), "Q_HEADS": 0}
    values["NEW_ROWS"] = at_once
    count, block = python_dim(tokens), head_rows.BLOCK
    write = Entry(
        "head_rows", (*names.values(), count),
        f"({count} + {block - 1}) // {block}, {2 * values['KV_HEADS']}", (("BLOCK_T", block),),
    )  # fmt: skip
    every = {min(NEW_TOKENS, most): {name: [e] for name, e in fused.items()}}
    if most > NEW_TOKENS:
        every[most] = {name: [write, e] for name, e in split.items()}
    last = {name: [write, e] for name, e in whole.items()}
    place = f"kv_write_{paged_attention.signature(spec)}"
    found = {m: choose(x, place, m, tuning) for m, x in [*every.items(), (None, last)]}
    return kernel(
        rows.name, bound, SUMMARY, bound.operands, values,
        [*head_rows.code_templates(rows), "head_rows", paged_attention.slopes(spec), "new_rows",
         "paged_attention"],
        [(m, forms.chosen) for m, forms in found.items()], tokens, inplace=head_rows.inplace(rows),
        lines=rows.lines, workspace=paged_attention.workspaces(spec),
        counters=paged_attention.counters(spec), others=found, signature=place,
    )  # fmt: skip


SUMMARY = (
    "writes the step's keys and values and attends: one launch for few tokens,",
    "else a program a head and a block of tokens writes first",
)
