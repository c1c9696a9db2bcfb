"""Weights that the checkpoint stores quantised: recipes over their rows, and regions by format.

A matrix `w` that is stored in a format F is known to recipes by two names: "w", its values, and
"w:F", its rows uint8 [N, row_bytes] (ir/quant_format.py). After bind_stored_weights the program
reads rows alone, and what computes with floats gets them by aios.dequantize_rows.

Where the columns of a matrix are shuffled among the groups (GPTQ's act-order), its rows hold them
sorted by group, and "v:order" is the column int32 [K] of each value; v is the first of the matrices
that have the same order, so that equal orders have one name.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx

from aios_compile.ir import ops
from aios_compile.ir.inputs import random_tensor
from aios_compile.ir.module import IRModule, Recipe, outputs
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantized import SCALE_DTYPES, QuantFields, pack_fields

assert ops.TABLE, "the op table registers the aios operators"
DEQUANTIZE = torch.ops.aios.dequantize_rows.default
INDEX_SELECT = torch.ops.aten.index_select.default
ARGSORT = torch.ops.aten.argsort.default
ORDER = "order"
RANDOM_ROWS = 64  # made for a random matrix; more rows repeat them


def stored_name(name: str, form: str) -> str:
    """Return the name of a tensor's rows."""
    return f"{name}:{form}"


def split_name(name: str) -> tuple[str, str]:
    """Return (tensor, format) of a name; the format is "" for values."""
    tensor, _, form = name.partition(":")
    return tensor, form


class StoredRows(NamedTuple):
    """The names of a matrix's rows and of its columns' order ("" where they are in order)."""

    name: str
    form: str
    order: str = ""


def stored_rows(recipe: Recipe) -> StoredRows | None:
    """Return what a recipe that dequantises stored rows reads, None of any other recipe."""
    result, names = outputs(recipe.graph)[0], recipe.names
    if result.target is INDEX_SELECT and len(names) == 2 and split_name(names[1])[1] == ORDER:
        result = result.args[0]
    elif len(names) != 1:
        return None
    if result.target is not DEQUANTIZE:
        return None
    form = str(result.args[1])
    return StoredRows(names[0], form, *names[1:]) if split_name(names[0])[1] == form else None


def bind_stored_weights(
    module: IRModule, forms: Mapping[str, str], orders: Mapping[str, str] | None = None
) -> None:
    """Make the weights in `forms` (name -> format) from their rows; then split the regions.

    orders: name -> the first matrix with the same order of columns, for those that have one. A
    region whose calls bind weights of different formats becomes one region a combination: code is
    made for a format.
    """
    for holder, recipe in list(module.weights.items()):
        if not recipe.is_identity():
            continue
        names = module.aliases.get(recipe.names[0], recipe.names)
        name = next((name for name in names if name in forms), None)
        if name is not None:
            order = (orders or {}).get(name, "")
            module.weights[holder] = _dequantized(name, forms[name], order)
    _split_regions(module)


def _dequantized(name: str, form: str, order: str) -> Recipe:
    graph = fx.Graph()
    rows = graph.placeholder("w0")
    if not order:
        graph.output(graph.call_function(DEQUANTIZE, (rows, form)))
        return Recipe(graph, (stored_name(name, form),))
    column = graph.placeholder("w1")
    values = graph.call_function(DEQUANTIZE, (rows, form))
    place = graph.call_function(ARGSORT, (column,))
    graph.output(graph.call_function(INDEX_SELECT, (values, 1, place)))
    return Recipe(graph, (stored_name(name, form), stored_name(order, ORDER)))


def _split_regions(module: IRModule) -> None:
    for name, region in module.regions().items():
        groups: dict[Hashable, list[fx.Node]] = {}
        for call in module.calls(name):
            groups.setdefault(_formats(module, call), []).append(call)
        for i, calls in enumerate(list(groups.values())[1:], 1):
            module.root.add_submodule(f"{name}_{i}", copy.deepcopy(region))
            for call in calls:
                call.target = f"{name}_{i}"
    module.root.recompile()


def _formats(module: IRModule, call: fx.Node) -> tuple[str, ...]:
    recipes = [module.weights.get(a.name) if isinstance(a, fx.Node) else None for a in call.args]
    stored = [None if recipe is None else stored_rows(recipe) for recipe in recipes]
    return tuple("" if s is None else s.form + (f" {ORDER}" if s.order else "") for s in stored)


def random_rows(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return seeded rows uint8 `shape` = [N, row_bytes] of the format in a name, or an order."""
    if split_name(name)[1] == ORDER:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        return torch.randperm(shape[0], generator=generator).to(torch.int32)
    form = QuantFormat.parse(split_name(name)[1])
    rows, depth = min(shape[0], RANDOM_ROWS), form.depth(shape[1])
    groups, spans = depth // form.group, depth // form.span
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))

    def whole(high: int, count: int) -> Tensor:
        return torch.randint(1, high, (rows, count), generator=generator, dtype=torch.uint8)

    def half(count: int, size: float, kind: str) -> Tensor:
        values = random_tensor(f"{name} {count}", (rows, count), torch.float32, seed)
        return ((values.abs() + 0.02) * size).to(SCALE_DTYPES[kind])

    step = 0.05 / (1 << (form.bits - 1))
    scales = whole(64, groups).to(torch.int8) if form.scales == "k" else None
    if scales is None:
        scales = half(groups, 20 * step, form.scales)
    minimums = None
    if form.minimums == "zero":
        minimums = whole(1 << form.bits, groups)
    elif form.minimums:
        minimums = whole(64, groups) if form.minimums == "k" else half(groups, 1, form.minimums)
    fields = QuantFields(
        torch.randint(0, 1 << form.bits, (rows, depth), generator=generator, dtype=torch.uint8),
        scales,
        minimums,
        half(spans, step / 2, "f16") if form.scales == "k" else None,
        half(spans, 0.03, "f16") if form.minimums == "k" else None,
    )
    made = pack_fields(form, fields)
    return made.repeat(-(-shape[0] // rows), 1)[: shape[0]]
