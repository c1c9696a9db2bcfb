"""The linear layers of two models as kernel specs: what is compiled ahead of time in tests."""

from __future__ import annotations

from typing import Any

import torch

from aios_compile.codegen.triton import linear
from aios_compile.ir import ops
from tests.codegen.harness import make_body

assert ops.TABLE
aios, aten = torch.ops.aios, torch.ops.aten
# hidden size, query width, key and value width, intermediate size, vocabulary
MODELS = {
    "Qwen3-0.6B": (1024, 2048, 1024, 3072, 151936),
    "Llama-3.1-8B": (4096, 4096, 1024, 14336, 128256),
}
LAYERS = ("qkv", "o", "gate_up", "down", "lm_head")


def _plain(x, w):
    return aios.linear.default(x, w)


def _gated(x, w):
    gate, up = aten.split.Tensor(aios.linear.default(x, w), w.shape[0] // 2, 1)
    return aios.gated_activation.default(gate, up, "silu")


def _residual(x, w, residual):
    return aten.add.Tensor(residual, aios.linear.default(x, w))


def linear_spec(model: str, layer: str, x_dtype: torch.dtype = torch.float32) -> Any:
    """Return the spec of a layer with bfloat16 weights; the head has R rows, the others T."""
    hidden, query, cached, inner, vocabulary = MODELS[model]
    function, rows, depth = {
        "qkv": (_plain, query + 2 * cached, hidden),
        "o": (_plain, hidden, query),
        "gate_up": (_gated, 2 * inner, hidden),
        "down": (_residual, hidden, inner),
        "lm_head": (_plain, vocabulary, hidden),
    }[layer]
    tokens = "R" if layer == "lm_head" else "T"
    inputs = {"x": ((tokens, depth), x_dtype), "w": ((rows, depth), torch.bfloat16)}
    if layer == "down":
        inputs["residual"] = ((tokens, rows), x_dtype)
    spec = linear.spec_of(*make_body(function, inputs))
    assert spec is not None
    return spec
