"""Planted mistakes: each is caught by the runner, named, and (where it can be) reverted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from torch import fx

from aios_compile.errors import PassError
from aios_compile.ir import snapshot
from aios_compile.passes import long_context
from aios_compile.passes.context import PassContext, PassOptions
from aios_compile.passes.graph_pass import PassFunction, info_of
from aios_compile.passes.pipeline import PIPELINE, STAGES
from aios_compile.passes.runner import Stage, run_pipeline
from tests.planted import (
    carried_plants,
    fuse_plants,
    programs,
    quantized_plants,
    raise_plants,
    rare_plants,
    rewrite_plants,
)
from tests.planted.plants import PLANTS, Plant

MISTAKES = (raise_plants, rewrite_plants, fuse_plants, rare_plants, carried_plants)
MISTAKES += (quantized_plants,)
assert all(MISTAKES), "they register themselves"
# What is no longer a program is seen without numbers.
SEEN = {
    "reads_the_old_cache": "expected one write",
    "caches_before_the_write_are_read": "expected one write",
    "scales_of_the_step_before": "expected one write",
    "dropped_residual": "returns its input",
    "activations_of_float_weights_rounded": "not of bf16",
    "limit_of_the_model_replaced": "limit",
}
WINDOWS = {"wide_window": {48}, "huge_window": {512}}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: f"{p.pass_name}-{p.name}")
def test_a_planted_mistake_is_caught_and_named(plant: Plant) -> None:
    function = programs.pass_named(plant.pass_name)
    module = programs.before(plant.program, plant.pass_name)
    before = snapshot.module_text(module)
    wrong = plant.apply_to(function)
    stages = [Stage(module.level, (wrong,))]
    if info_of(function).required:
        failed = f"the required pass {plant.pass_name} failed: "
        with pytest.raises(PassError, match=failed) as error:
            run_pipeline(module, stages, programs.options_of(plant.program))
        reason = str(error.value)
    else:
        (result,) = run_pipeline(module, stages, programs.options_of(plant.program))
        assert not result.kept and result.name == plant.pass_name
        assert snapshot.module_text(module) == before
        reason = result.reason
    assert any(wrong.spoiled), "the mistake found nothing to spoil"
    assert SEEN.get(plant.name, "exceeds the budget") in reason, "no crash of the plant itself"


def test_every_pass_has_planted_mistakes() -> None:
    """Of every pass of both targets at least three, each another slip."""
    slips = {(plant.pass_name, plant.name) for plant in PLANTS}
    counts = Counter(pass_name for pass_name, _ in slips)
    assert counts.keys() == {info_of(p).name for p in PIPELINE}
    assert {name: n for name, n in counts.items() if n < 3} == {}


@pytest.mark.parametrize("name", ["halves_swapped", "dropped_residual", "merged_transposed"])
def test_the_pipeline_goes_on_without_the_wrong_pass(name: str) -> None:
    """Only the planted pass is not kept, and the program is what it is with that pass disabled."""
    plant = next(p for p in PLANTS if p.name == name)
    stages = [
        replace(stage, passes=tuple(_planted(plant, p) for p in stage.passes)) for stage in STAGES
    ]
    module = snapshot.take(programs.level_1(plant.program))
    results = run_pipeline(module, stages, programs.options_of(plant.program))
    assert [r.name for r in results if not r.kept] == [plant.pass_name]
    without = snapshot.take(programs.level_1(plant.program))
    run_pipeline(without, STAGES, PassOptions(), disabled=[plant.pass_name], verify=0)
    assert snapshot.module_text(module) == snapshot.module_text(without)


def test_a_rewrite_that_is_not_counted_is_proven() -> None:
    plant = next(p for p in PLANTS if p.name == "bias_dropped")
    wrong = plant.apply_to(programs.pass_named(plant.pass_name))

    def silent(graph: fx.Graph, context: PassContext) -> int:
        return 0 * wrong(graph, context)

    silent.info = info_of(wrong)  # type: ignore[attr-defined]
    module = programs.before(plant.program, plant.pass_name)
    before = snapshot.module_text(module)
    (result,) = run_pipeline(module, [Stage(module.level, (silent,))], PassOptions())
    assert not result.kept and "exceeds the budget" in result.reason
    assert snapshot.module_text(module) == before


def _planted(plant: Plant, function: PassFunction) -> PassFunction:
    return plant.apply_to(function) if info_of(function).name == plant.pass_name else function


@pytest.mark.parametrize(
    "name", ["half", "wide_window", "huge_window", "dynamic", "quantised", "rounded"]
)
def test_right_passes_are_kept_on_the_same_programs(name: str) -> None:
    module = snapshot.take(programs.level_1(name))
    results = run_pipeline(module, STAGES, programs.options_of(name))
    assert all(r.kept for r in results), [r.reason for r in results if not r.kept]
    assert long_context.bounds(module) == WINDOWS.get(name, set()), "the program keeps its windows"


def test_a_pass_that_widens_gets_no_budget_from_half_precision() -> None:
    module = programs.before("half", "widen_activations")
    stages = [Stage(module.level, (programs.pass_named("widen_activations"),))]
    (result,) = run_pipeline(module, stages, PassOptions())
    assert result.error_budget is not None and result.error_budget < 1e-4
