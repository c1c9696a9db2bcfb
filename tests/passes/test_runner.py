"""The runner: wrong passes are reverted and named, required ones raise, options are honoured."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import fx

from aios_compile.errors import ConfigError, PassError
from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule, Level
from aios_compile.passes.context import PassContext, PassOptions, Refusal
from aios_compile.passes.graph_pass import graph_pass
from aios_compile.passes.result import PassResult
from aios_compile.passes.runner import Stage, run_pipeline
from tests.passes.helpers import captured

aten = torch.ops.aten


@pytest.fixture(scope="module")
def original() -> IRModule:
    return captured("qwen3")


@pytest.fixture
def module(original: IRModule) -> IRModule:
    return snapshot.take(original)


def run(module: IRModule, *passes: Any, **options: Any) -> dict[str, PassResult]:
    stage = Stage(Level.CAPTURED, passes)
    return {r.name: r for r in run_pipeline(module, [stage], PassOptions(), **options)}


def nodes_of(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target))


@graph_pass(numerics="exact")
def swap_sum(graph: fx.Graph, context: PassContext) -> int:
    """Turn a + b into b + a: right."""
    for node in nodes_of(graph, aten.add.Tensor):
        if isinstance(node.args[1], fx.Node):
            node.args = (node.args[1], node.args[0])
            return 1
    return 0


@graph_pass(numerics="exact")
def change_eps(graph: fx.Graph, context: PassContext) -> int:
    """Replace the epsilon of the norms: wrong."""
    found = [n for n in nodes_of(graph, aten.add.Tensor) if n.args[1] == 1e-6]
    for node in found:
        node.args = (node.args[0], 1e-5)
    return len(found)


@graph_pass(numerics="lossy")
def drop_residual(graph: fx.Graph, context: PassContext) -> int:
    """Leave out a residual sum: wrong, even with the budget of a lossy pass."""
    if not context.region:
        return 0
    node = nodes_of(graph, aten.add.Tensor)[-1]
    node.replace_all_uses_with(node.args[1])
    return 1


@graph_pass(numerics="exact")
def swap_rope_halves(graph: fx.Graph, context: PassContext) -> int:
    """Concatenate the halves of a rotation the other way round: wrong."""
    if not context.region:
        return 0
    node = nodes_of(graph, aten.cat.default)[0]
    node.args = (list(reversed(node.args[0])), *node.args[1:])
    return 1


def _merge(context: PassContext, graph: fx.Graph, dim: int) -> int:
    """Read a square projection from the first half of a merged weight."""
    if not context.region:
        return 0
    products = nodes_of(graph, aten.mm.default)
    up = next(n for n in products if "o_proj" in str(n.args[1].args[0]))
    weight = up.args[1].args[0]
    new = context.add_weight(
        graph, "merged", [weight], lambda w: torch.cat([w.transpose(0, dim), w])
    )
    with graph.inserting_before(up):
        part = context.call(
            graph, aten.slice.Tensor, new, 0, 0, weight.meta["val"].shape[0], source=[up]
        )
        turned = context.call(graph, aten.permute.default, part, [1, 0], source=[up])
    up.args = (up.args[0], turned)
    return 1


@graph_pass(numerics="exact")
def merge_weights(graph: fx.Graph, context: PassContext) -> int:
    """Merge weights through a recipe: right."""
    return _merge(context, graph, 0)


@graph_pass(numerics="exact")
def merge_transposed(graph: fx.Graph, context: PassContext) -> int:
    """Merge a transposed weight through a recipe: wrong."""
    return _merge(context, graph, 1)


@graph_pass(numerics="exact")
def crash(graph: fx.Graph, context: PassContext) -> int:
    """Edit the graph, then crash."""
    change_eps(graph, context)
    raise RuntimeError("planted")


@graph_pass(numerics="exact")
def break_the_graph(graph: fx.Graph, context: PassContext) -> int:
    """Leave a node that is used before it is defined."""
    first, last = nodes_of(graph, aten.add.Tensor)[0], nodes_of(graph, aten.add.Tensor)[-1]
    first.args = (last, first.args[1])
    return 1


@graph_pass(numerics="exact")
def refuse(graph: fx.Graph, context: PassContext) -> int:
    """Find nothing but a near miss."""
    context.refuse(Refusal("an extra user", "model.py:1 in forward: x"))
    return 0


@graph_pass(numerics="exact", required=True)
def required_and_wrong(graph: fx.Graph, context: PassContext) -> int:
    """Be wrong where it matters."""
    return change_eps(graph, context)


@graph_pass(numerics="exact", target="triton")
def elsewhere(graph: fx.Graph, context: PassContext) -> int:
    """Serve another target."""
    raise AssertionError("runs for its own target only")


@pytest.mark.parametrize(
    "wrong",
    [change_eps, drop_residual, swap_rope_halves, merge_transposed, crash, break_the_graph],
    ids=lambda f: f.__name__,
)
def test_a_wrong_pass_is_reverted_and_named(module: IRModule, wrong: Any) -> None:
    before = snapshot.module_text(module)
    result = run(module, wrong)[wrong.__name__]
    assert not result.kept and result.reason
    assert result.nodes[0] == result.nodes[1]
    assert snapshot.module_text(module) == before


@pytest.mark.parametrize("right", [swap_sum, merge_weights], ids=lambda f: f.__name__)
def test_a_right_pass_is_kept_with_its_numbers(module: IRModule, right: Any) -> None:
    result = run(module, right)[right.__name__]
    assert result.kept, result.reason
    assert result.hits >= 1 and result.max_error is not None and result.error_budget is not None
    assert 0 < result.max_error <= result.error_budget < 1e-4


def test_what_follows_a_reverted_pass_still_runs(module: IRModule) -> None:
    results = run(module, change_eps, swap_sum)
    assert not results["change_eps"].kept and results["swap_sum"].kept


def test_a_required_pass_raises(module: IRModule) -> None:
    with pytest.raises(PassError, match=r"required_and_wrong failed: error .* against fp64"):
        run(module, required_and_wrong)


def test_without_verification_nothing_is_measured(module: IRModule) -> None:
    result = run(module, change_eps, verify=0)["change_eps"]
    assert result.kept and result.max_error is None


def test_disabled_passes_are_left_out(module: IRModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOS_DISABLE", "change_eps")
    results = run(module, swap_sum, change_eps, disabled=["swap_sum"])
    assert [(r.kept, r.hits, r.reason) for r in results.values()] == [(False, 0, "disabled")] * 2


def test_unknown_and_required_names_cannot_be_disabled(module: IRModule) -> None:
    with pytest.raises(ConfigError, match=r"no pass 'nonsense'(.|\n)*swap_sum"):
        run(module, swap_sum, disabled=["nonsense"])
    with pytest.raises(ConfigError, match="required"):
        run(module, required_and_wrong, disabled=["required_and_wrong"])


def test_bisect_keeps_the_first_rewrites(module: IRModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOS_BISECT", "1")
    results = run(module, swap_sum, merge_weights)
    assert results["swap_sum"].kept
    assert results["merge_weights"].reason == "left out by AIOS_BISECT"


def test_refusals_carry_the_model_line(module: IRModule) -> None:
    (text,) = run(module, refuse)["refuse"].refusals
    assert text == "an extra user (model.py:1 in forward: x)"


def test_passes_of_another_target_do_not_run(module: IRModule) -> None:
    assert run(module, elsewhere) == {}


def test_stages_advance_the_level_and_dumps_follow_changes(module: IRModule) -> None:
    class Names:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def level(self, name: str, program: IRModule) -> None:
            self.seen.append(name)

    dump = Names()
    run(module, swap_sum, change_eps, refuse, dump=dump)
    assert dump.seen == ["swap_sum"] and module.level is Level.CAPTURED


def test_op_deltas_and_nodes(module: IRModule) -> None:
    result = run(module, merge_weights)["merge_weights"]
    assert result.op_deltas == {"aten.slice.Tensor": 1}
    assert result.nodes[1] == result.nodes[0] + 1


def test_a_result_survives_json() -> None:
    row = PassResult("p", "exact", True, 2, ("why",), 1.5, (3, 2), {"a": -1}, 1e-7, 1e-6)
    assert PassResult.from_json(json.loads(json.dumps(row.to_json()))) == row
