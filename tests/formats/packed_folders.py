"""Write folders in GPTQ, AWQ and compressed-tensors from codes that the test draws.

The packers follow the formats' definitions word by word, and share nothing with the readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Array = np.ndarray[Any, Any]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Drawn:
    """Codes [N, K], zeros and scales [N, G], the group of each column [K]."""

    codes: Array
    zeros: Array
    scales: torch.Tensor
    groups: Array

    def weight(self) -> torch.Tensor:
        """Return what they mean, in float32."""
        whole = self.codes.astype(np.int64) - self.zeros.astype(np.int64)[:, self.groups]
        return torch.from_numpy(whole).float() * self.scales.float()[:, self.groups]


def draw(
    shape: tuple[int, ...], bits: int, group: int, dtype: torch.dtype, kind: str, seed: int
) -> Drawn:
    """kind: "sym" (zero in the middle), "asym" (any zero but 0), "asym0" (0 as well), with
    "+order" for columns whose groups are shuffled, "+shared" where all matrices of as many columns
    share one order (one input, as GPTQ sees it), "+uneven" for groups of other sizes.
    """
    generator = np.random.default_rng(seed)
    rows, columns = shape
    group = columns if group == -1 else group
    num_groups = -(-columns // group)
    codes = generator.integers(0, 1 << bits, shape)
    half = 1 << (bits - 1)
    zeros = np.full((rows, num_groups), half)
    if kind.startswith("asym"):
        low = 0 if kind.startswith("asym0") else 1
        zeros = generator.integers(low, 1 << bits, (rows, num_groups))
    scales = generator.uniform(0.5, 1.5, (rows, num_groups)) / half / np.sqrt(columns)
    groups = np.arange(columns) // group
    if kind.endswith(("+order", "+uneven")):
        generator.shuffle(groups)
    if kind.endswith("+shared"):
        np.random.default_rng(columns).shuffle(groups)
    if kind.endswith("+uneven"):
        groups[np.argmax(groups == 0)] = 1
    return Drawn(codes, zeros, torch.from_numpy(scales).to(dtype), groups)


def words(codes: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Pack along the last axis: code i of a word stands at bit i * bits, or order[i] does."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    count = -(-codes.shape[-1] // per_word)
    result = np.zeros((*codes.shape[:-1], count), np.uint64)
    for word in range(count):
        for i in range(per_word):
            at = word * per_word + order[i]
            if at < codes.shape[-1]:
                result[..., word] |= codes[..., at].astype(np.uint64) << np.uint64(bits * i)
    return result.astype(np.uint32).view(np.int32)


def gptq(
    stem: str, drawn: Drawn, bits: int, v1: bool = True, index: bool = True
) -> dict[str, torch.Tensor]:
    stored = words(drawn.zeros.T, bits).astype(np.int64)
    if v1:  # one subtraction from each word, as GPTQModel saves it
        ones = sum(1 << at for at in range(0, 32, bits))
        stored = (stored - ones) & 0xFFFFFFFF
    tensors = {
        "qweight": torch.from_numpy(np.ascontiguousarray(words(drawn.codes, bits).T)),
        "qzeros": torch.from_numpy(stored.astype(np.uint32).view(np.int32)),
        "scales": drawn.scales.T.contiguous(),
    }
    if index:
        tensors["g_idx"] = torch.from_numpy(drawn.groups.astype(np.int32))
    return {f"{stem}.{ending}": tensor for ending, tensor in tensors.items()}


def awq(stem: str, drawn: Drawn) -> dict[str, torch.Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{stem}.qweight": torch.from_numpy(words(drawn.codes.T, 4, order)),
        f"{stem}.qzeros": torch.from_numpy(words(drawn.zeros.T, 4, order)),
        f"{stem}.scales": drawn.scales.T.contiguous(),
    }


def compressed(
    stem: str, drawn: Drawn, bits: int, symmetric: bool, index: bool = False
) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": torch.from_numpy(words(drawn.codes, bits)),
        "weight_scale": drawn.scales,
        "weight_shape": torch.tensor(drawn.codes.shape),
    }
    if not symmetric:
        packed = np.ascontiguousarray(words(np.ascontiguousarray(drawn.zeros.T), bits).T)
        tensors["weight_zero_point"] = torch.from_numpy(packed)
    if index:
        tensors["weight_g_idx"] = torch.from_numpy(drawn.groups.astype(np.int32))
    return {f"{stem}.{ending}": tensor for ending, tensor in tensors.items()}


def convert(
    folder: Path,
    target: Path,
    settings: dict[str, Any],
    make: Callable[[str, tuple[int, ...], int], tuple[Drawn, dict[str, torch.Tensor]]],
    dtype: str = "float16",
) -> dict[str, torch.Tensor]:
    """Write `folder` with packed linear layers; return what its tensors mean, in float32.

    make(stem, shape, seed) draws a layer and packs it.
    """
    tensors, meant = {}, {}
    for seed, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        stem, _, ending = name.rpartition(".")
        if ending == "weight" and stem.rpartition(".")[2] in LINEARS:
            drawn, parts = make(stem, tuple(tensor.shape), seed)
            tensors |= parts
            meant[name] = drawn.weight()
        else:
            tensors[name] = tensor.to(getattr(torch, dtype))
            meant[name] = tensors[name].float()
    target.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"torch_dtype": dtype, "quantization_config": settings}
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    return meant
