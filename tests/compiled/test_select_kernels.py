"""select_kernels on a whole model: the ledger in the artefact and the report, no bit changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from aios_compile.codegen.cpp import candidates, linear
from aios_compile.codegen.kernel_choices import FILE, KernelChoices, everywhere
from tests.compiled.conftest import Load

# An artefact of its own: options that no other test uses.
OWN = {"max_model_len": 93, "max_num_batched_tokens": 23}


def large_head_only(weight_bytes: int) -> tuple[Any, ...]:
    """Leave a choice for the largest matrix of the model: one kernel takes longer to build."""
    large = weight_bytes > 40_000
    return candidates.candidates_of(weight_bytes << 10) if large else ()


@pytest.mark.usefixtures("as_shipped")
def test_a_compiled_model_keeps_its_ledger(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "candidates_of", large_head_only)
    monkeypatch.setenv("AIOS_SELECT_KERNELS", "1")
    model = load("llama_gqa", **OWN)
    kernels = [k for k in model.program.kernels if k.candidates]
    assert len(kernels) == 1
    data = json.loads((model.artefact_path / FILE).read_text())
    ledger = KernelChoices.from_json(data)
    assert ledger.buckets == (1,) and {t.tokens for t in ledger.trials} == {1}
    assert not ledger.huge_pages, "so small a model stays mapped"
    assert set(ledger.chosen or {}) == {kernels[0].name}
    lines = [note for note in model.report().notes if note.startswith("select_kernels: ")]
    assert len(lines) == len(ledger.trials) + len(ledger.notes)
    assert sum(kernels[0].name in line for line in lines) == len(ledger.trials)
    ids = torch.arange(3, 40)
    want, tokens = model(ids), model.generate([5, 6, 7], max_tokens=8, temperature=0)
    assert model.runner is not None
    for candidate in kernels[0].candidates:
        model.runner.choose(everywhere(model.program, candidate.name))
        assert torch.equal(model(ids), want), candidate.name
        again = model.generate([5, 6, 7], max_tokens=8, temperature=0)
        assert again.outputs[0].token_ids == tokens.outputs[0].token_ids
    cached = load("llama_gqa", **OWN)
    assert cached.artefact_path == model.artefact_path, "nothing is compiled or timed again"
    assert cached.runner is not None
    assert cached.runner._choices.tolist() == ledger.table(cached.program).tolist()
    assert torch.equal(cached(ids), want)


def test_small_matrices_leave_no_choice(load: Load) -> None:
    model = load("llama_gqa")
    assert not (model.artefact_path / FILE).exists()
    assert not any(k.candidates for k in model.program.kernels)
    assert not any("select_kernels" in note for note in model.report().notes)
