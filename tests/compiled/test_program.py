"""What the whole compile makes of the four families: hits, launches, phases, threads; pinned."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from aios_compile.codegen.cpp.step import num_barriers
from aios_compile.compiled_model import CompiledModel
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.pipeline import PIPELINE
from aios_compile.passes.result import PassResult
from tests.compiled.conftest import Load
from tests.variants import nightly

# One region: a layer is rewritten once, however many there are.
HITS = {
    "raise_linear": 8,  # q k v o gate up down, and the head
    "raise_attention": 1,
    "raise_gated_mlp": 1,
    "page_attention": 1,
    "gather_last_tokens": 1,
    "sample_tokens": 1,
    "merge_qkv": 1,
    "merge_gate_up": 1,
    "fuse_qk_norm_rope_kv_write": 1,
    "fuse_add_rms_norm": 1,
}
NORMS = {"llama_gqa": 3, "mistral_window": 3, "qwen2_gqa": 3, "qwen3_gqa": 5}
LAYER = (
    "rms_norm", "linear", "rope_kv_write", "paged_attention", "linear", "add_rms_norm",
    "linear_gated_activation", "linear",
)  # fmt: skip


def layer_kernels(model: CompiledModel) -> list[str]:
    items: Any = model.program.function("layer").items
    return [item.label for item in items]


@pytest.mark.parametrize(
    "name", ["llama_gqa", "qwen3_gqa", *nightly("mistral_window", "qwen2_gqa")]
)
def test_hits_and_launches_are_pinned(
    name: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged q, k and v have as many rows here as the vocabulary. Passes that were right were
    refused, because the samples before and after them had different token ids.
    """
    monkeypatch.setenv("AIOS_VERIFY", "1")
    model = load(name)
    report, program = model.report(), model.program
    assert [p.name for p in report.passes] == [
        p.__name__ for p in PIPELINE if info_of(p).target in ("", "cpp")
    ]
    assert all(p.kept for p in report.passes), str(report)
    hits = report.hits()
    assert {k: hits[k] for k in HITS} == HITS
    assert hits["raise_rms_norm"] == NORMS[name] and hits["raise_rope"] == 2
    for row in report.passes:
        assert row.max_error is None or row.max_error <= (row.error_budget or 0.0)
    labels = layer_kernels(model)
    assert len(labels) == len(LAYER) == 8
    assert all(part in label for part, label in zip(LAYER, labels)), labels
    layers = sum(len(f.rows) for f in program.functions)
    outer = program.num_launches - 8 * layers
    assert layers == 2 and outer == OUTER_LAUNCHES
    assert num_barriers(program) <= program.num_launches


OUTER_LAUNCHES = 5  # embedding, rotary tables; norm of the gathered rows, head, sample


def test_samples_fit_a_model_of_few_positions(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes were proven on 45 positions with a page table for 32, and failed."""
    monkeypatch.setenv("AIOS_VERIFY", "1")
    model = load("qwen2_dynamic", max_model_len=24)
    assert all(p.kept for p in model.report().passes), str(model.report())
    assert model.limits.max_model_len == 24


def test_a_report_of_a_failed_pass_is_json() -> None:
    """An infinite error ended the whole compile when the report was written."""
    row = PassResult("p", "exact", False, max_error=math.inf, error_budget=1.0, kept=False)
    assert json.loads(json.dumps(row.to_json(), allow_nan=False))["max_error"] is None


def test_depth_costs_launches_and_no_code(load: Load) -> None:
    """A model with windows in some layers has one region a kind, however deep it is."""
    model = load("qwen3_layer_types")
    functions = [f for f in model.program.functions if f.name != "step"]
    assert [len(f.rows) for f in functions] == [2, 1]
    assert model.program.num_launches == 8 * 3 + OUTER_LAUNCHES


def test_fewer_threads_when_more_measure_slower(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})

    def timed(every: float, one: float) -> Any:
        def time_step(self: CompiledModel) -> float:
            assert self.runner is not None
            steps.append(self.runner.num_threads)
            return every if self.runner.num_threads > 1 else one

        return time_step

    small, large = 1 << 40, 0
    steps: list[int] = []
    cases = ((90.0, 50.0, small, 1), (50.0, 90.0, small, 2), (90.0, 50.0, large, 2))
    for every, one, limit, kept in cases:
        monkeypatch.setattr(CompiledModel, "_time_step", timed(every, one))
        monkeypatch.setattr("aios_compile.compiled_model.LARGE_MODEL_BYTES", limit)
        steps.clear()
        model = load("qwen3_gqa", num_threads=None)
        assert model.runner is not None and model.runner.num_threads == kept
        assert bool(steps) == (limit == small), "a large model's first step is the first token's"
        assert any("the model is large" in n or "a step takes" in n for n in model.progress.notes)
        given = load("qwen3_gqa", num_threads=2)  # the user's number is kept
        assert given.runner is not None and given.runner.num_threads == 2


def test_a_decode_step_is_timed_for_real(load: Load) -> None:
    model = load("qwen3_gqa", num_threads=None)
    assert 0 < model._time_step() < 1e6
