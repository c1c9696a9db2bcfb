"""A tiny model with quantised weights as Triton kernels in the interpreter."""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported

import pytest
import torch

pytest.importorskip("triton")

from aios_compile.ir import quantized
from tests.interpreted.harness import assert_close, batch, model


def exact_activations(x: torch.Tensor) -> Any:
    """Stand in for the rounding of activations: the Triton kernels do not round them."""
    return x, x.new_ones(*x.shape[:-1], x.shape[-1] // quantized.ACTIVATION_GROUP)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_steps_are_those_of_eager(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "quantize_activations", exact_activations)
    built = model("qwen3_gqa", quantization=form)
    packed = {entry.packed for entry in built.program.weights}
    assert any(name.startswith(f"planar.{form}") for name in packed), packed
    ours, eager = built.executor(), built.eager()
    for number, sequences in enumerate(([(0, 5), (0, 2)], [(5, 1)])):
        given = batch(sequences, seed=number)
        assert_close(ours.step(given), eager.step(given), 2e-4)
