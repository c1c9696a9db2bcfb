"""compressed-tensors in the format "pack-quantized": integer weights of 4 or 8 bits.

    weight_packed      int32 [N, ceil(K * bits / 32)]    codes of consecutive k in a word
    weight_scale       float [N, G]                      G = 1 for the strategy "channel"
    weight_shape       int64 [2]                         N, K
    weight_zero_point  int32 [ceil(N * bits / 32), G]    only where not symmetric; packed along N
    weight_g_idx       int32 [K]                         the group of each k; may be absent

Codes and zero points are signed there, stored with half of the range added: here they stay as
they are stored, which changes no difference of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aios_compile.checkpoint.packed_matrix import (
    SCALE_DTYPES,
    Codes,
    PackedLayout,
    PackedMatrix,
    check_bits,
    check_group,
    floats_of,
    matrix_of,
    part,
    read_group_index,
    unpack,
)
from aios_compile.checkpoint.weights import WeightFiles
from aios_compile.errors import CheckpointError, UnsupportedModelError

FORMAT = "pack-quantized"
PRESETS = {"W4A16": 4, "W4A16_ASYM": 4, "W8A16": 8}  # groups given by name
STRATEGIES = ("group", "channel")


class Scheme(NamedTuple):
    """What a config group says. group: columns a scale, -1 for a whole row, 0 where it is silent:
    then the columns are cut evenly.
    """

    bits: int
    group: int

    def fits(self, columns: int, words: int, num_groups: int) -> bool:
        """Say whether a matrix of these sizes may be packed so."""
        if columns < 1 or -(-columns * self.bits // 32) != words:
            return False
        if not self.group:
            return 0 < num_groups <= columns and columns % num_groups == 0
        return num_groups == (1 if self.group == -1 else -(-columns // self.group))

    def columns_a_scale(self, columns: int, num_groups: int) -> int:
        """Return the columns of a group; the last group of a matrix may have fewer."""
        return self.group if self.group > 0 else columns // num_groups


class CompressedMatrix:
    """One linear layer's weight."""

    def __init__(self, weights: WeightFiles, stem: str, layout: PackedLayout) -> None:
        self.layout = layout
        self._weights = weights
        self._stem = stem

    def codes(self, begin: int, end: int) -> Codes:
        words = self._weights.read(f"{self._stem}.weight_packed")[begin:end]
        return unpack(words, self.layout.bits, axis=1)[:, : self.layout.columns]

    def scales(self, begin: int, end: int) -> NDArray[Any]:
        return floats_of(self._weights, f"{self._stem}.weight_scale")[begin:end]

    def zeros(self, begin: int, end: int) -> Codes | None:
        if "zeros" not in self.layout.parts:
            return None
        words = self._weights.read(f"{self._stem}.weight_zero_point")
        return unpack(words, self.layout.bits, axis=0)[begin:end]

    def group_of_column(self) -> NDArray[np.int64] | None:
        if "order" not in self.layout.parts:
            return None
        name = f"{self._stem}.weight_g_idx"
        if np.all(self._weights.read(name) == -1):  # reserved and not used
            return None
        return read_group_index(self._weights, name, self.layout)


def find_compressed(
    weights: WeightFiles, settings: Mapping[str, Any], where: str
) -> dict[str, PackedMatrix]:
    """Return the quantised weights by their names' stems."""
    schemes = _check_settings(settings, where)
    found: dict[str, PackedMatrix] = {}
    for name in weights.names():
        stem, _, ending = name.rpartition(".")
        if ending == "weight_packed":
            found[stem] = CompressedMatrix(weights, stem, _layout(weights, stem, schemes))
    return found


def _check_settings(settings: Mapping[str, Any], where: str) -> list[Scheme]:
    """Return the schemes in use; refuse what is more than packed integer weights."""
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: config_groups is {repr(groups)[:40]}, expected groups")
    top = settings.get("format")
    if top not in (FORMAT, "mixed-precision"):
        raise _refused(where, f"format {repr(top)[:40]}", FORMAT)
    if settings.get("quantization_status", "compressed") != "compressed":
        raise _refused(where, f"quantization_status {settings['quantization_status']!r}")
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.get(key):
            raise _refused(where, key)
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise _refused(where, f"sparsity_config format {repr(sparsity['format'])[:40]}")
    return sorted({_scheme(name, group, f"{where}: {name}") for name, group in groups.items()})


def _scheme(name: str, group: Any, where: str) -> Scheme:
    if isinstance(group, list):
        if name not in PRESETS:
            raise _refused(where, "the scheme", ", ".join(PRESETS))
        return Scheme(PRESETS[name], 0)
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where}: no weights in the group")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise _refused(where, f"{key} (quantised activations)")
    if group.get("format") not in (None, FORMAT):
        raise _refused(where, f"format {repr(group['format'])[:40]}", FORMAT)
    if weights.get("type", "int") != "int":
        raise _refused(where, f"weights of type {repr(weights['type'])[:40]}", "int")
    if weights.get("strategy") not in STRATEGIES:
        raise _refused(where, f"strategy {repr(weights.get('strategy'))[:40]}", "group, channel")
    size = -1 if weights["strategy"] == "channel" else weights.get("group_size")
    return Scheme(
        check_bits(weights.get("num_bits"), where), 0 if size is None else check_group(size, where)
    )


def _refused(where: str, what: str, known: str = "") -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: compressed-tensors with {what} is not implemented"
        + (f", known: {known}" if known else ""),
        advice="use a checkpoint with weights of 4 or 8 bits only (W4A16, W8A16), or in bfloat16",
    )


def _layout(weights: WeightFiles, stem: str, schemes: list[Scheme]) -> PackedLayout:
    rows, words = matrix_of(weights, f"{stem}.weight_packed")
    info = part(weights, f"{stem}.weight_shape", ("I64",), (2,))
    said_rows, columns = (int(size) for size in weights.read(f"{stem}.weight_shape"))
    if said_rows != rows:
        raise CheckpointError(
            f"{info.file}: tensor {stem + '.weight_shape'!r} says {[said_rows, columns]}, which "
            f"weight_packed of {[rows, words]} words cannot hold"
        )
    scale = weights.info(f"{stem}.weight_scale")
    num_groups = scale.shape[1] if len(scale.shape) == 2 else 1
    scheme = next((s for s in schemes if s.fits(columns, words, num_groups)), None)
    if scheme is None:
        known = ", ".join(f"{s.bits} bits in groups of {s.group or 'any size'}" for s in schemes)
        raise CheckpointError(
            f"{info.file}: {stem}: {[rows, columns]} weights in {words} words a row with "
            f"{num_groups} scales fit none of quantization_config's groups ({known})"
        )
    parts = {
        "codes": weights.info(f"{stem}.weight_packed"),
        "scales": part(weights, f"{stem}.weight_scale", SCALE_DTYPES, (rows, num_groups)),
        "shape": info,
    }
    if f"{stem}.weight_zero_point" in weights:
        zero_words = -(-rows * scheme.bits // 32)
        shape = (zero_words, num_groups)
        parts["zeros"] = part(weights, f"{stem}.weight_zero_point", ("I32",), shape)
    if f"{stem}.weight_g_idx" in weights:
        parts["order"] = part(weights, f"{stem}.weight_g_idx", ("I32",), (columns,))
    group = scheme.columns_a_scale(columns, num_groups)
    label = f"compressed-tensors int{scheme.bits}"
    return PackedLayout(label, rows, columns, scheme.bits, group, parts)
