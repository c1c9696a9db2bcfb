"""verify: accepts what the passes make, and names the node of each broken rule."""

# ruff: noqa: F821, UP037  (annotations are shapes)
from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from aios_compile.errors import PassError
from aios_compile.ir.fusion import fuse_nodes
from aios_compile.ir.module import IRModule, Level, body_of, outputs, placeholders
from aios_compile.ir.verifier import verify
from aios_compile.passes.page_attention import page_attention
from tests.passes import helpers, level2
from tests.passes.test_form_kernels import PASSES

aten = torch.ops.aten
aios = torch.ops.aios


def paged() -> IRModule:
    module = level2.program()
    helpers.apply(page_attention, module)
    return module


def kernels() -> IRModule:
    module = level2.program()
    for function in PASSES:
        helpers.apply(function, module)
    module.level = Level.KERNELS
    return module


def layer(module: IRModule) -> fx.Graph:
    return module.regions()["layer"].graph


def find(graph: fx.Graph, target: Any) -> fx.Node:
    return next(n for n in graph.nodes if n.target == target)


def no_value(module: IRModule) -> None:
    del find(layer(module), aten.add.Tensor).meta["val"]


def no_model_line(module: IRModule) -> None:
    node = find(layer(module), aten.add.Tensor)
    node.meta = {"val": node.meta["val"]}


def not_an_operator(module: IRModule) -> None:
    find(layer(module), aten.add.Tensor).target = torch.add


def sdpa_left(module: IRModule) -> None:
    find(layer(module), aten.add.Tensor).target = aios.sdpa.default


def wrong_dtype(module: IRModule) -> None:
    node = placeholders(layer(module))[0]
    with module.mode:
        node.meta["val"] = node.meta["val"].double()


def missing_argument(module: IRModule) -> None:
    call = module.calls("layer")[1]
    call.args = call.args[:-1]


def bare_output(module: IRModule) -> None:
    output = module.root.graph.output_node()
    output.args = (outputs(module.root.graph)[0],)


def read_before_write(module: IRModule) -> None:
    graph = layer(module)
    node = find(graph, aios.paged_attention.default)
    old = next(n for n in placeholders(graph) if n.name == "k_cache")
    node.update_arg(1, old)


def swapped_caches(module: IRModule) -> None:
    write = find(layer(module), aios.kv_write.default)
    write.args = (*write.args[:2], write.args[3], write.args[2], write.args[4])


def old_cache_returned(module: IRModule) -> None:
    graph = layer(module)
    values = outputs(graph)
    values[1] = next(n for n in placeholders(graph) if n.name == "k_cache")
    graph.output_node().args = (tuple(values),)


def not_written(module: IRModule) -> None:
    name = next(iter(module.states))
    module.states[name] = 0


def unknown_binding(module: IRModule) -> None:
    module.inputs["nobody"] = "token_ids"


BROKEN_LEVEL_2: dict[str, tuple[Callable[[IRModule], None], str]] = {
    "no_value": (no_value, "has no fake value"),
    "no_model_line": (no_model_line, "lost the model's source line"),
    "not_an_operator": (not_an_operator, "is not an operator"),
    "sdpa_left": (sdpa_left, "attention was not recognised"),
    "wrong_dtype": (wrong_dtype, r"argument \w+ is float32"),
    "missing_argument": (missing_argument, "arguments, expected"),
    "bare_output": (bare_output, "a graph returns a tuple"),
    "read_before_write": (read_before_write, "the old cache is used by"),
    "swapped_caches": (swapped_caches, "is not the cache that this step wrote"),
    "old_cache_returned": (old_cache_returned, "the old cache is used by"),
    "not_written": (not_written, "output 0 is not the cache that this step wrote"),
    "unknown_binding": (unknown_binding, "inputs binds nobody"),
}


def test_every_level_of_a_good_program_passes() -> None:
    for module in (level2.program(), paged(), kernels()):
        verify(module)


@pytest.mark.parametrize("name", BROKEN_LEVEL_2)
def test_each_broken_rule_is_named(name: str) -> None:
    change, message = BROKEN_LEVEL_2[name]
    module = paged()
    verify(module)
    change(module)
    with pytest.raises(PassError, match=message):
        verify(module)


def test_the_error_names_region_node_and_model_line() -> None:
    module = paged()
    sdpa_left(module)
    with pytest.raises(PassError, match=r"(?s)add_\d+ in region layer: .*at level2.py:\d+"):
        verify(module)


def test_a_bare_op_at_level_3_is_refused() -> None:
    module = paged()
    module.level = Level.KERNELS
    with pytest.raises(PassError, match="neither a kernel call nor a view"):
        verify(module)


def test_a_kernel_call_at_level_1_is_refused() -> None:
    module = kernels()
    module.level = Level.CAPTURED
    with pytest.raises(PassError, match="a kernel call in a captured graph"):
        verify(module)


def test_stale_strides_at_level_3_are_refused() -> None:
    module = kernels()
    call = find(layer(module), "linear")
    holder = placeholders(body_of(call).graph)[0]
    with module.mode:
        holder.meta["val"] = holder.meta["val"].t().contiguous().t()
    with pytest.raises(PassError, match="with strides"):
        verify(module)


def test_a_body_that_returns_its_input_is_refused() -> None:
    module = kernels()
    body = body_of(find(layer(module), "linear")).graph
    body.output_node().args = (placeholders(body)[0],)
    with pytest.raises(PassError, match=r"returns its input|result 0 is"):
        verify(module)


def test_a_kernel_that_keeps_the_written_cache_to_itself_is_refused() -> None:
    module = kernels()
    body = body_of(find(layer(module), "qk_norm_rope_kv_write")).graph
    values = outputs(body)
    body.output_node().args = ((values[0], values[2], values[1]),)
    with pytest.raises(PassError, match=r"is not the cache|result 1 is"):
        verify(module)


def test_a_tensor_of_t_by_t_is_refused_unless_the_program_is_call_only() -> None:
    def f(x: "f32[T, 1]", y: "f32[1, T]") -> Any:
        return x * y

    module = helpers.trace(f)
    graph = module.root.graph
    node = find(graph, aten.mul.Tensor)
    node.meta["source_lines"] = ("model.py:1 in forward: x * y",)
    fuse_nodes(graph, [node], "mul", "pointwise")
    module.level = Level.KERNELS
    verify(module)  # call-only: it keeps no cache
    cached = kernels()
    position = find(cached.root.graph, "embedding")
    size = position.meta["val"].shape[0]
    with cached.mode:
        position.meta["val"] = position.meta["val"].new_empty(size, size)
    with pytest.raises(PassError, match=r"a tensor of T x T elements is left|result 0 is"):
        verify(cached)


def test_results_are_read_through_getitem_of_the_right_index() -> None:
    module = paged()
    graph = module.root.graph
    index = next(iter(module.states.values()))
    item = outputs(graph)[index]
    assert item.target is operator.getitem
    item.args = (item.args[0], 0)
    with pytest.raises(PassError, match="is not the cache that this step wrote"):
        verify(module)
