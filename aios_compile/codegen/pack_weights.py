"""Execute the weight recipes and write the packed results to disk, one tensor at a time.

The peak is one merged weight and its packed copy; NaN and Inf are found on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aios_compile.codegen.packing import FLOAT_LAYOUTS, check_finite, kind_of, pack
from aios_compile.codegen.planar import pack_planar
from aios_compile.codegen.plane import PREFIX
from aios_compile.codegen.program import Program, WeightEntry
from aios_compile.codegen.quantized_weights import (
    QUANTISED_LAYOUTS,
    QuantizedWeight,
    describe,
    form_of,
    source_of,
)
from aios_compile.errors import CheckpointError
from aios_compile.ir.module import IRModule, Recipe
from aios_compile.ir.quantize_rows import quantize_rows

Array = NDArray[Any]
Read = Callable[[str], Tensor]


class TensorWriter(Protocol):
    """Where packed tensors go (codegen.artefact.ArtefactWriter)."""

    def add_tensor(self, name: str, array: Array, dtype: str | None = None) -> Any: ...


class CheckpointTensors(Mapping[str, Tensor]):
    """Checkpoint tensors by name, read when they are asked for; aliases are followed."""

    def __init__(self, module: IRModule, read: Read) -> None:
        self.module = module
        self.read = read

    def __getitem__(self, name: str) -> Tensor:
        if name in self.module.tensors:
            return self.module.tensors[name].detach()
        names = self.module.aliases.get(name, (name,))
        for alias in names:
            try:
                return self.read(alias)
            except KeyError:
                continue
        raise CheckpointError(f"tensor {' or '.join(names)} is in none of the checkpoint's files")

    def __iter__(self) -> Any:
        return iter(self.module.aliases)

    def __len__(self) -> int:
        return len(self.module.aliases)


def pack_weights(
    program: Program,
    module: IRModule,
    read: Read,
    writer: TensorWriter,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[QuantizedWeight]:
    """Write every weight of the program; describe the quantised ones.

    `read(name)` gives a checkpoint tensor or KeyError.

    Raises CheckpointError naming the tensor for NaN or Inf values.
    """
    tensors = CheckpointTensors(module, read)
    described = []
    for i, entry in enumerate(program.weights):
        recipe = module.weights[entry.name.removesuffix(f".{entry.packed}")]
        if kind_of(entry.packed) in QUANTISED_LAYOUTS:
            array, weight = _quantized(entry, recipe, tensors)
            described.append(weight)
            writer.add_tensor(entry.name, array, entry.dtype)
        else:
            writer.add_tensor(entry.name, _packed(entry, recipe, tensors), entry.dtype)
        if on_progress is not None:
            on_progress(i + 1, len(program.weights))
    return described


def _packed(entry: WeightEntry, recipe: Recipe, tensors: Mapping[str, Tensor]) -> Array:
    dtype = getattr(torch, entry.dtype)
    with torch.no_grad():
        value = recipe.run(tensors).to(dtype)
    label = _checked(entry, recipe, value)
    array = to_numpy(value.contiguous())
    if kind_of(entry.packed) in FLOAT_LAYOUTS:
        return pack(array, entry.packed, label)
    check_finite(array, label)
    return array


def _quantized(
    entry: WeightEntry, recipe: Recipe, tensors: Mapping[str, Tensor]
) -> tuple[Array, QuantizedWeight]:
    form = form_of(entry.packed)
    source = source_of(recipe)
    with torch.no_grad():
        value = None if source is None else source.run(tensors)
        rows = recipe.run(tensors) if value is None else quantize_rows(value, form.name)
        label = _checked(entry, recipe, rows)
        if rows.dim() == 3:  # of experts, one under the other
            rows, value = rows.flatten(0, 1), None if value is None else value.flatten(0, 1)
        if entry.packed.startswith(PREFIX):
            array = pack_planar(rows, form, label).numpy()
        else:
            array = pack(rows.numpy(), entry.packed, label)
        return array, describe(label, entry.packed, rows, value)


def _checked(entry: WeightEntry, recipe: Recipe, value: Tensor) -> str:
    """Return what errors call a weight; raise CheckpointError when it has another shape."""
    label = " + ".join(recipe.names[:3])
    if tuple(value.shape) != entry.shape:
        raise CheckpointError(
            f"{label}: shape {tuple(value.shape)}, expected {entry.shape} for {entry.name}"
        )
    return label


def to_numpy(value: Tensor) -> Array:
    """Return a CPU tensor's memory as an array; bfloat16 as its bits in uint16."""
    if value.dtype == torch.bfloat16:
        return value.view(torch.uint16).numpy()
    return value.numpy()


def from_numpy(array: Array, dtype: str) -> Tensor:
    """Return a checkpoint array (safetensors dtype name, e.g. "BF16") as a tensor, uncopied."""
    with warnings.catch_warnings():  # read-only maps: nothing writes through these tensors
        warnings.simplefilter("ignore", UserWarning)
        if dtype == "BF16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
