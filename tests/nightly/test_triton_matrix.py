"""Every linear layer, embedding, product and sampler of two models, compiled for four targets.

No kernel spills, and each uses exactly the registers and shared memory of triton_resources.txt
where the compiler is the one that wrote it (resources.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from aios_compile.codegen.triton import embedding, linear, matmul, quantized_linear, sample
from aios_compile.codegen.triton.cards import CARDS, card_of
from aios_compile.codegen.triton.compile_ahead import compile_ahead
from tests.codegen.kernels import operands_of, trace
from tests.codegen.test_sample import body_of
from tests.codegen.test_triton_binaries import WEIGHT_LOADS
from tests.codegen.test_triton_quantized_linear import gated, plain, quantized_spec
from tests.codegen.triton_shapes import LAYERS, MODELS, linear_spec
from tests.nightly.resources import hold

PINNED = Path(__file__).parent / "triton_resources.txt"
f32, bf16, i64 = torch.float32, torch.bfloat16, torch.int64


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("model", MODELS)
def test_linear_layers(model: str, target: str, tmp_path: Path) -> None:
    card = card_of(target)
    sources = [linear.emit(linear_spec(model, layer), card) for layer in LAYERS]
    for layer, binaries in zip(LAYERS, compile_ahead(sources, target, tmp_path)):
        assert all(b.spill_bytes == 0 for b in binaries), [b for b in binaries if b.spill_bytes]
        hold(PINNED, f"{target} {model} {layer}", binaries)


@pytest.mark.parametrize("target", CARDS)
def test_activations_in_half_precision(target: str, tmp_path: Path) -> None:
    """No model's: the engine keeps activations in float32. They compile, and 16 bytes a load."""
    source = linear.emit(linear_spec("Qwen3-0.6B", "down", bf16), card_of(target))
    (binaries,) = compile_ahead([source], target, tmp_path)
    assert all(b.spill_bytes == 0 for b in binaries), [b for b in binaries if b.spill_bytes]


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("form", ["int4_g32_f16", "int8_g32_f16"])
def test_quantized_linears(form: str, target: str, tmp_path: Path) -> None:
    shapes = ((plain, 4096, 1024), (gated, 28672, 4096), (plain, 4096, 14336))
    specs = [quantized_spec(f, form, rows, depth)[2] for f, rows, depth in shapes]
    sources = [quantized_linear.emit(spec, card_of(target)) for spec in specs]
    for binaries in compile_ahead(sources, target, tmp_path):
        assert all(b.spill_bytes == 0 for b in binaries), binaries
        (row,) = (b for b in binaries if "_rows_" in b.kernel)
        loads = WEIGHT_LOADS.findall(row.assembly())
        # four codes a thread, 128 bytes of a row in a warp (quantized_linear._rows)
        assert all(x.endswith(".b32") for x in loads) and bool(loads) == ("cuda" in target)


@pytest.mark.parametrize("target", CARDS)
def test_embedding_product_and_sampler(target: str, tmp_path: Path) -> None:
    for hidden, _, _, _, vocabulary in MODELS.values():
        table = ((vocabulary, hidden), bf16)
        looked_up = trace(lambda i, w: F.embedding(i, w).float(), (("T",), i64), table)
        scores = trace(torch.bmm, ((8, "T", 128), f32), ((8, 128, "T"), f32))
        made = [(embedding, looked_up, operands_of(looked_up))]
        made.append((matmul, scores, operands_of(scores)))
        made.append((sample, *body_of(vocabulary)))
        sources = [emitter.emit(emitter.spec_of(body, given)) for emitter, body, given in made]
        for source, binaries in zip(sources, compile_ahead(sources, target, tmp_path)):
            assert all(b.spill_bytes == 0 for b in binaries), source.symbol
