"""Every kernel of the models of tests/codegen/test_triton_models.py, compiled for four targets.

Nothing spills, what streams loads 16 bytes at a time, and each launch uses what its line of
tests/codegen/triton_ledger.txt says; UPDATE_RESOURCES=1 writes the lines.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from aios_compile.codegen.triton import expert_linear, topk
from aios_compile.codegen.triton.cards import CARDS
from aios_compile.codegen.triton.compile_ahead import compile_ahead
from tests.codegen import test_expert_linear as experts
from tests.codegen.kernels import operands_of, trace
from tests.codegen.triton_ledger import Ledger, hold
from tests.codegen.triton_models import LEDGER, MODELS, kernels_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("model", MODELS)
def test_kernels_of_a_model(model: str, target: str, folder: Path, tmp_path: Path) -> None:
    kernels = [k for k in kernels_of(model, folder) if k.target == target]
    found = hold(
        kernels, Ledger(LEDGER), lambda s, t, _: compile_ahead(s, t, tmp_path, 1), everything=True
    )
    assert set(found) == set(kernels)
    for kernel, binaries in found.items():
        if kernel.source.emitter == "kv_write_attention" and "pages" in kernel.model:
            attends = [b for b in binaries if "attend" in b.kernel]
            converts = ["e4m3" in b.assembly() for b in attends]  # by cards that have them
            reads_e4m3 = "fp8" in kernel.model and CARDS[target].fp8
            assert attends and all(converts) == any(converts) == reads_e4m3


@pytest.mark.parametrize("target", CARDS)
def test_experts_and_their_choice(target: str, tmp_path: Path) -> None:
    """Qwen3-30B-A3B: 128 experts of 768 inner features, eight a token."""
    inputs = [(("T", 2048), torch.float32), ((128, 1536, 2048), torch.bfloat16)]
    body = trace(experts.product(False), *inputs, (("T", 8), torch.int64))
    router = trace(lambda x: tuple(torch.topk(x, 8)), (("T", 128), torch.float32))
    made = [(expert_linear, body), (topk, router)]
    sources = [e.emit(e.spec_of(b, operands_of(b))) for e, b in made]  # type: ignore[attr-defined]
    for source, binaries in zip(sources, compile_ahead(sources, target, tmp_path)):
        assert all(b.spill_bytes == 0 for b in binaries), (source.name, binaries)
    if "cuda" in target:
        assert (
            "cp.async.cg.shared.global"
            in compile_ahead(sources[:1], target, tmp_path)[0][0].assembly()
        )
