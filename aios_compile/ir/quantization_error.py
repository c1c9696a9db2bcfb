"""Measure, before anything is compiled, what quantising each weight would lose; say which to keep.

For a layer y = W x whose inputs x are independent and identically distributed, the relative error
of y is that of W, |W' - W| / |W| (Frobenius norms), whatever the size of the inputs. So no data is
needed, and a few rows, evenly spread, are enough.

The limit is not a number in this file. Rounding costs a well-behaved matrix (independent normal
values) an error that is measured once for each format; one bit fewer would double it. A weight that
loses more than that does not have the bits that it is stored in, and stays as it is. A region is
compiled once for all its layers, so they stay or go together: the root mean square over the layers
of one place decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantize_rows import quantize_rows
from aios_compile.ir.quantized import dequantize

ROWS = 32  # of a matrix that are measured
EXPERTS = 8  # of a mixture, whose rows they are
NORMAL_SHAPE = (64, 1024)
A_BIT = 2.0  # a step twice as wide errs twice as much


@dataclass(frozen=True)
class Measured:
    """Relative errors by checkpoint name, and by place (the name without the layer's number).

    limit: what a place may lose. kept: the places that lose more.
    """

    form: str
    errors: Mapping[str, float]
    places: Mapping[str, float]
    limit: float

    @property
    def kept(self) -> dict[str, float]:
        return {place: error for place, error in self.places.items() if error > self.limit}

    def kept_weights(self) -> tuple[tuple[str, str], ...]:
        """Return (checkpoint name, reason) of every weight of the places that stay."""
        found = []
        for name in self.errors:
            place = place_of(name)
            if place in self.kept:
                found.append((name, f"{place} would lose {self._text(place)}"))
        return tuple(found)

    def remarks(self) -> list[str]:
        """Return what the report says."""
        if not self.places:
            return []
        worst = max(self.places, key=self.places.__getitem__)
        kept = f"kept: {', '.join(self.kept)}" if self.kept else "none is kept for it"
        return [
            f"measured before quantising {len(self.errors)} weights to {self.form}: {worst} loses "
            f"most, {self._text(worst)}; {kept}"
        ]

    def _text(self, place: str) -> str:
        return (
            f"{self.places[place]:.2%} of its values, root mean square (limit {self.limit:.2%}: "
            "what one bit fewer costs normal weights)"
        )


def place_of(name: str) -> str:
    """Return a checkpoint name with the layers' numbers replaced: model.layers.*.mlp.up_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def relative_error(weight: Tensor, form: str) -> float:
    """Return |W' - W| / |W| of some rows of a matrix [N, K], K a multiple of the format's span."""
    picked = torch.linspace(0, len(weight) - 1, min(len(weight), ROWS)).long()
    rows = weight[picked].float()
    lost = (dequantize(quantize_rows(rows, form), QuantFormat.parse(form)) - rows).norm()
    return float(lost / rows.norm().clamp_min(1e-30))


def _error(matrix: Tensor, form: QuantFormat) -> float | None:
    fitting = form.fitting(int(matrix.shape[1]))
    return None if fitting is None else relative_error(matrix, fitting.name)


def _matrices(weight: Tensor) -> list[Tensor]:
    """Return the matrices [N, K] to measure: the weight, or those of all experts under each other.

    Experts are stored as [E, N, K] or [E, K, N]; the model says which, and is not asked here: both
    are measured, and the worse of the two counts.
    """
    if weight.dim() == 2:
        return [weight]
    picked = torch.linspace(0, len(weight) - 1, min(len(weight), EXPERTS)).long()
    ways = (weight[picked], weight[picked].transpose(1, 2))
    return [w.flatten(0, 1) for w in ways]


def limit_of(form: str) -> float:
    """Return what a place may lose in a format: a bit more than normal weights do."""
    generator = torch.Generator().manual_seed(0)
    return A_BIT * relative_error(torch.randn(NORMAL_SHAPE, generator=generator), form)


def measure(weights: Iterable[tuple[str, Tensor]], form: str) -> Measured:
    """Measure matrices by checkpoint name; those that the format does not fit are left out."""
    parsed = QuantFormat.parse(form)
    errors, squares = dict[str, float](), dict[str, list[float]]()
    for name, weight in weights:
        if weight.dim() in (2, 3) and weight.is_floating_point():
            found = (_error(matrix, parsed) for matrix in _matrices(weight))
            error = max((e for e in found if e is not None), default=math.nan)
            if math.isfinite(error):  # what is not finite is refused, by name, when it is packed
                errors[name] = error
                squares.setdefault(place_of(name), []).append(error * error)
    places = {place: math.sqrt(sum(found) / len(found)) for place, found in squares.items()}
    return Measured(form, errors, places, limit_of(form))
