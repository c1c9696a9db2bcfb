"""Certificates: the cache, the budget, and programs whose inputs, weights and outputs change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from aios_compile.ir import evaluate, inputs, snapshot
from aios_compile.ir.module import IRModule, Level, outputs
from aios_compile.ir.random_weights import RandomWeights, shrinkable_vocabulary
from aios_compile.passes import certificate as certificate_file
from aios_compile.passes.certificate import CertificateCache, Certifier
from aios_compile.passes.context import PassContext, PassOptions
from aios_compile.passes.gather_last_tokens import gather_last_tokens
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.measure import Samples, choose_steps, state_shapes
from aios_compile.passes.page_attention import page_attention
from aios_compile.passes.result import PassResult
from aios_compile.passes.runner import Stage, run_pipeline
from aios_compile.passes.widen_activations import widen_activations
from tests.passes.helpers import captured, trace
from tests.planted import programs

aten, aios = torch.ops.aten, torch.ops.aios
SHORT = Samples((5,))


@pytest.fixture(scope="module")
def llama() -> IRModule:
    return captured("llama")


def run(module: IRModule, *passes: Any, **options: Any) -> dict[str, PassResult]:
    stage = Stage(module.level, passes)
    return {r.name: r for r in run_pipeline(module, [stage], PassOptions(), **options)}


@graph_pass(numerics="exact")
def swap_sum(graph: fx.Graph, context: PassContext) -> int:
    """Turn a + b into b + a."""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if isinstance(node.args[1], fx.Node):
            node.args = (node.args[1], node.args[0])
            return 1
    return 0


def test_a_second_compile_measures_nothing(
    llama: IRModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CertificateCache(tmp_path / "certificates")
    first = run(snapshot.take(llama), swap_sum, certificates=cache)["swap_sum"]
    assert not first.cached and len(list(cache.folder.glob("*.json"))) == 1
    monkeypatch.setattr(certificate_file, "run_steps", None)
    second = run(snapshot.take(llama), swap_sum, certificates=cache)["swap_sum"]
    assert second.cached and second.max_error == first.max_error


@pytest.mark.parametrize("change", ["seed", "program", "damage"])
def test_the_cache_forgets_when_anything_changes(
    llama: IRModule, tmp_path: Path, change: str
) -> None:
    cache = CertificateCache(tmp_path)
    run(snapshot.take(llama), swap_sum, certificates=cache)
    if change == "damage":
        next(tmp_path.glob("*.json")).write_text(json.dumps({"max_error": 0}))
    program = snapshot.take(llama)
    if change == "program":
        norm = next(n for n in program.root.graph.nodes if n.args[1:] == (1e-6,))
        norm.args = (norm.args[0], 1e-5)
    seed = 1 if change == "seed" else 0
    again = run(program, swap_sum, certificates=cache, seed=seed)["swap_sum"]
    assert again.kept and not again.cached


def attention_program() -> IRModule:
    def f(
        x: "input f32[T, 48]",  # type: ignore[valid-type]  # noqa: F722
        w: "weight f32[16, 48]",  # type: ignore[valid-type]  # noqa: F722
    ) -> Any:
        h = aios.linear.default(x, w, None)
        q = aten.view.default(h, [-1, 2, 8])
        out = aios.attention.default(q, q, q, 0.3, 4, None, None, None)
        return aten.view.default(out, [-1, 16])

    module = trace(f)
    module.level = Level.SEMANTIC
    for node in module.root.graph.nodes:
        node.meta["source_lines"] = ("attention_program",)
    return module


def test_paging_is_proven_over_two_chunks_and_permuted_pages() -> None:
    module = attention_program()
    result = run(module, page_attention)["page_attention"]
    assert result.kept, result.reason
    assert result.hits == 1 and module.states and result.max_error is not None


@graph_pass(numerics="exact")
def misread_cache(graph: fx.Graph, context: PassContext) -> int:
    """Page attention with a window that is one key short: right only while the window is open."""
    hits = page_attention(graph, context)
    for node in graph.find_nodes(op="call_function", target=aios.paged_attention.default):
        node.args = (*node.args[:7], 3, *node.args[8:])
    return hits


def test_a_window_off_by_one_is_caught() -> None:
    result = run(attention_program(), misread_cache)["misread_cache"]
    assert not result.kept and "T=" in result.reason


def test_gathering_rows_is_compared_at_the_rows(llama: IRModule) -> None:
    module = snapshot.take(llama)
    result = run(module, gather_last_tokens)["gather_last_tokens"]
    assert result.kept and result.hits, result.reason
    assert "logit_rows" in module.inputs.values()


def test_widening_is_held_against_fp64() -> None:
    module = captured("llama", torch.bfloat16)
    result = run(module, widen_activations)["widen_activations"]
    assert result.kept, result.reason
    assert result.max_error is not None and result.max_error < 1e-5
    assert outputs(module.root.graph)[0].meta["val"].dtype == torch.float32


def test_one_layer_of_each_kind_runs_and_the_others_pass_through() -> None:
    module = captured("llama", num_hidden_layers=4)
    table = evaluate.carried(module)
    assert table is not None and len(table) == 4
    weights = RandomWeights.of(module, 0)
    values = {
        **inputs.sample_inputs(module, inputs.whole(3), 0),
        **{n: weights.weight(r) for n, r in module.weights.items()},
    }
    skips = {name: table[name] for name in list(table)[1:]}
    partly, _ = evaluate.run(module, values, skips=skips)
    fully, _ = evaluate.run(module, values)
    assert partly["logits"].shape == fully["logits"].shape
    assert not torch.equal(partly["logits"], fully["logits"])


def test_the_vocabulary_shrinks_only_where_nothing_mentions_it(llama: IRModule) -> None:
    module = snapshot.take(llama)
    assert shrinkable_vocabulary(module) == 101
    weights = RandomWeights.of(module, 0, 101)
    assert weights.tensor("lm_head.weight").shape[0] == 64
    logits = outputs(module.root.graph)[0]
    logits.args = (logits.args[0], logits.args[1])
    with module.root.graph.inserting_after(logits):
        view = module.root.graph.call_function(aten.view.default, (logits, [-1, 101]))
    view.meta.update(logits.meta)
    assert shrinkable_vocabulary(module) == 0


def test_random_weights_keep_their_values_in_float64() -> None:
    weights = RandomWeights.of(captured("llama", torch.bfloat16), 3)
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        stored, oracle = weights.tensor(name), weights.tensor(name, in_float64=True)
        assert stored.dtype == torch.bfloat16 and torch.equal(stored.double(), oracle)
        assert stored.float().std() > 0.01
    wide = weights.widened(stored)
    assert wide.dtype == torch.float32 and torch.equal(wide.double(), oracle)


def test_a_pass_behind_a_lossy_one_is_measured_from_there() -> None:
    """Rounding that was meant once is no room for the passes that follow."""
    options = programs.options_of("quantised")
    before = programs.before("quantised", "quantize_weights")
    after = snapshot.take(before)
    lossy = programs.pass_named("quantize_weights")
    run_pipeline(after, [Stage(after.level, (lossy,))], options, verify=0)
    weights = RandomWeights.of(programs.level_1("quantised"), 0)
    behind, fresh = (Certifier(before, options, 0, None, SHORT, weights) for _ in range(2))
    assert behind.measure(before, after, lossy).holds
    found, alone = (c.measure(after, snapshot.take(after), swap_sum) for c in (behind, fresh))
    assert found.holds and found.error_budget == alone.error_budget


def test_weights_that_change_leave_the_samples_of_a_paged_program() -> None:
    """Mixed batches, as for any other pass: the names of states are compared, not of weights."""
    before = programs.before("qwen3", "merge_qkv")
    after = snapshot.take(before)
    run(after, programs.pass_named("merge_qkv"), verify=0)
    assert set(state_shapes(before)) == set(before.states) and before.weights != after.weights
    mixed = inputs.mixed(19, longest=120)
    assert choose_steps(before, after, 19) == ([mixed], [mixed])
    assert mixed.starts == (119, 7, 0), "a past of more than 64 tokens"
