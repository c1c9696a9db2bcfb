"""What quantisation did to each weight: bits a weight and error, measured while packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from aios_compile.codegen.packing import FLOAT_LAYOUTS, kind_of
from aios_compile.codegen.program import Program
from aios_compile.ir.module import Recipe, outputs
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantized import dequantize

QUANTISED_LAYOUTS = ("quant16", "planar")  # a format's name follows
SAMPLED_ROWS = 128  # of a matrix whose error is measured
KV_NAMES = {"i8": "int8", "e4m3": "fp8 (e4m3)"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class QuantizedWeight:
    """error: root mean square of the difference over that of the weights, on rows spread evenly.

    None for weights that were quantised before (their file holds nothing to compare with).
    """

    name: str
    form: str
    rows: int
    depth: int
    bits: float
    error: float | None


def form_of(packed: str) -> QuantFormat:
    """Return the format of rows in one of QUANTISED_LAYOUTS."""
    return QuantFormat.parse(packed.partition(".")[2])


def describe(name: str, packed: str, rows: Tensor, source: Tensor | None) -> QuantizedWeight:
    """Describe quantised rows; `source` is the matrix [N, K] that they were made of."""
    form = form_of(packed)
    depth = form.depth(rows.shape[1])
    error = None
    if source is not None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # small tensors: on a busy machine barriers would take seconds
        try:
            error = _error(rows, source, form)
        finally:
            torch.set_num_threads(threads)
    return QuantizedWeight(name, form.name, len(rows), depth, 8 * rows.shape[1] / depth, error)


def _error(rows: Tensor, source: Tensor, form: QuantFormat) -> float:
    picked = torch.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_ROWS)).long()
    want = source[picked].float()
    lost = (dequantize(rows[picked], form) - want).square().mean()
    return float((lost / want.square().mean().clamp_min(1e-30)).sqrt())


def source_of(recipe: Recipe) -> Recipe | None:
    """Return the recipe of what a weight is quantised from, None when it is not here."""
    result = outputs(recipe.graph)[0]
    if result.target is not torch.ops.aios.quantize_rows.default:
        return None
    return recipe.until(result.args[0])


def kv_remarks(program: Program) -> list[str]:
    """Return what the report says of a KV cache of codes: bytes a token, bits a value."""
    held = [s for s in program.states if s.dtype in KV_NAMES]
    codes = sum(prod(s.page_shape) for s in held)
    if not codes:
        return []
    scales = sum(4 * prod(s.page_shape) for s in program.states if s.dtype == "f32")
    page = program.settings["page_size"]
    name = KV_NAMES[held[0].dtype]
    return [
        f"KV cache in {name}, a scale a token and head: {(codes + scales) // page:,} bytes a "
        f"token, {8 * (codes + scales) / codes:.2f} bits a value; its error: pass quantize_kv"
    ]


def remarks(program: Program, weights: Sequence[QuantizedWeight]) -> list[str]:
    """Return what the report says: rounded activations; bits a weight of all matrices that are
    multiplied, those of experts included; errors.
    """
    rounded = sum(kind_of(w.packed) == "pairs16" for w in program.weights)
    notes = []
    if rounded:
        notes.append(
            f"{rounded} matrices of bf16 are multiplied by activations rounded to bf16 "
            "(AIOS_DISABLE=round_activations keeps float32)"
        )
    if not weights:
        return notes
    floats = [w for w in program.weights if kind_of(w.packed) not in QUANTISED_LAYOUTS]
    kept = [w for w in floats if kind_of(w.packed) in FLOAT_LAYOUTS or len(w.shape) > 2]
    count = sum(w.rows * w.depth for w in weights) + sum(prod(w.shape) for w in kept)
    total = sum(w.rows * w.depth * w.bits for w in weights)
    total += sum(8 * BYTES[w.dtype] * prod(w.shape) for w in kept)
    forms = ", ".join(dict.fromkeys(w.form for w in weights))
    lines = [
        f"{len(weights)} matrices quantised to {forms}, {len(kept)} kept: "
        f"{total / count:.2f} bits a weight over {count / 1e6:.1f} million"
    ]
    errors = sorted((w.error, w.name) for w in weights if w.error is not None)
    if errors:
        (least, _), (middle, _), (most, name) = errors[0], errors[len(errors) // 2], errors[-1]
        lines.append(
            f"relative error of the quantised weights: {least:.2%} to {most:.2%}, median "
            f"{middle:.2%}, largest in {name} (all of them: quantization.json)"
        )
    return [*notes, *lines]
