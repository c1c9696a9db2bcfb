"""Logits in float32 of exactly the weights that an engine holds, to check it before it is timed.

Ours and llama.cpp round the checkpoint differently. Each is therefore held against transformers in
float32 on its own dequantised weights: what is left is what its arithmetic rounds (activations of
8 bits in groups of 32; keys and values of 16 bits). llama.cpp's come from the gguf package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aios_compile.ir.quant_format import SHORT_NAMES, QuantFormat
from aios_compile.ir.quantize_rows import quantize_rows
from aios_compile.ir.quantized import dequantize
from benchmarks.gguf_file import KINDS
from benchmarks.peers import eager

# Relative error of the logits (2-norm over all of them). Activations of 8 bits give 0.4-0.7 % a
# linear of the row's norm; 28 layers of random weights add up to several per cent.
LIMITS = {"bf16": 0.02, "int8": 0.08, "int4": 0.08}


@dataclass(frozen=True)
class Rounding:
    """Which matrices an engine rounds: all linears but `kept`; the embedding table or not."""

    side: str  # "ours" or "llama.cpp"
    weights: str
    kept: tuple[str, ...] = ()
    table: bool = False

    @staticmethod
    def of_program(weights: str, program: Any) -> Rounding:
        """Read off a compiled program what it holds in which form."""
        plain = [w for w in program.weights if "quantize_rows" not in w.recipe]
        names = [part for w in plain if w.packed for part in w.recipe.split("'")[1::2]]
        table = not any("embed_tokens" in w.recipe for w in plain)
        return Rounding("ours", weights, tuple(sorted(names)), table)

    @staticmethod
    def of_llama(weights: str) -> Rounding:
        """The whole file is of one type."""
        return Rounding("llama.cpp", weights, (), True)

    def apply(self, model: Any) -> None:
        """Give a float32 model the rounded values; a tied matrix may differ from its table."""
        if self.weights == "bf16":
            return
        rounded = _ours(self.weights) if self.side == "ours" else _ggml(self.weights)
        for name, module in model.named_modules():
            kind = (nn.Linear, nn.Embedding) if self.table else nn.Linear
            if isinstance(module, kind) and f"{name}.weight" not in self.kept:
                module.weight = nn.Parameter(rounded(module.weight.data), requires_grad=False)


def logits(
    folder: Path, store: Path, ids: Sequence[int], rounding: Rounding
) -> np.ndarray[Any, Any]:
    """Return [T, vocab] of transformers in float32; kept in `store` once computed."""
    digest = hashlib.sha256(repr((rounding, list(ids))).encode()).hexdigest()[:16]
    path = store / f"reference-{digest}.npy"
    if path.exists():
        return np.asarray(np.load(path))
    model = eager.load(folder, "float32")
    rounding.apply(model)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()
    np.save(path, found)
    return np.asarray(found)


def error(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """Return the difference over the reference, both as 2-norms."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _ours(weights: str) -> Callable[[Tensor], Tensor]:
    form = SHORT_NAMES[weights]
    return lambda w: dequantize(quantize_rows(w, form), QuantFormat.parse(form))


def _ggml(weights: str) -> Callable[[Tensor], Tensor]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as meaning
    from gguf.quants import quantize

    kind = GGMLQuantizationType[KINDS[weights]]
    return lambda w: torch.from_numpy(meaning(quantize(w.numpy(), kind), kind))
