"""Run a spec in plain torch: the definition of correct for the pointwise and reduction emitters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aios_compile.codegen.access import Access, Leaf
from aios_compile.codegen.expression import (
    TORCH_DTYPES,
    Expr,
    Index,
    Load,
    evaluate,
    substitute,
    walk,
)
from aios_compile.codegen.linear_index import Linear
from aios_compile.codegen.operand import Dim, Operand, SizeExpr, dim_value


def infer_sizes(operands: Sequence[Operand], tensors: Sequence[Tensor]) -> dict[str, int]:
    """Return the runtime sizes that the tensors' shapes imply; sizes that no shape shows are 1."""
    sizes = {"T": 1, "S": 1, "R": 1, "P": 1}
    for operand, tensor in zip(operands, tensors):
        for dim, size in zip(operand.shape, tensor.shape):
            if isinstance(dim, SizeExpr) and len(dim.terms) <= 2 and len(dim.terms[0][0]) == 1:
                (name,), factor = dim.terms[0]
                rest = dim.terms[1][1] if len(dim.terms) == 2 else 0
                sizes[name] = (int(size) - rest) // factor
    return sizes


def new_outputs(operands: Sequence[Operand], sizes: Mapping[str, int]) -> list[Tensor]:
    """Return empty tensors with the operands' sizes and strides."""
    return [
        torch.empty_strided(
            [dim_value(d, sizes) for d in o.shape],
            [dim_value(d, sizes) for d in o.strides],
            dtype=TORCH_DTYPES[o.dtype],
        )
        for o in operands
    ]


def flat(tensor: Tensor) -> Tensor:
    """Return the tensor's memory from its first element on."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((count,), (1,))


@dataclass
class Grid:
    """All coordinates of an iteration space (or of a part of it), one axis a dimension."""

    shape: Sequence[Dim]
    ranges: Sequence[tuple[int, int | None]]
    sizes: Mapping[str, int]
    leaves: Sequence[Leaf]
    tensors: Sequence[Tensor]

    def extent(self) -> list[int]:
        return [len(self._coordinate(d).flatten()) for d in range(len(self.shape))]

    def _coordinate(self, dim: int) -> Tensor:
        low, high = self.ranges[dim]
        size = dim_value(self.shape[dim], self.sizes)
        place = [1] * len(self.shape)
        place[dim] = -1
        return torch.arange(low, size if high is None else high).view(place)

    def value(self, expr: Expr) -> Tensor:
        """Return the expression at every point."""
        used = {e.index for e in walk(expr) if isinstance(e, Load)}
        loaded = [
            self._leaf(leaf) if i in used else torch.zeros(()) for i, leaf in enumerate(self.leaves)
        ]
        coordinates = [self._coordinate(d) for d in range(len(self.shape))]
        first = len(loaded)
        plain = substitute(
            expr, lambda e: Load(first + e.dim, "i64") if isinstance(e, Index) else None
        )
        return evaluate(plain, [*loaded, *coordinates], self.sizes).expand(self.extent())

    def _leaf(self, leaf: Leaf) -> Tensor:
        if isinstance(leaf, Access):
            return flat(self.tensors[leaf.operand])[self.address(leaf.address)]
        value = self.value(leaf.value)
        if leaf.kind in ("argmax", "argmin"):
            return getattr(value, leaf.kind)(-1, keepdim=True)  # type: ignore[no-any-return]
        name = {"max": "amax", "min": "amin"}.get(leaf.kind, leaf.kind)
        return getattr(value, name)(-1, keepdim=True)  # type: ignore[no-any-return]

    def address(self, linear: Linear) -> Tensor:
        return self.value(linear.expr())

    def put(self, out: Tensor, linear: Linear, value: Tensor) -> None:
        """Store a value at every point."""
        flat(out)[self.address(linear)] = value.to(out.dtype)
