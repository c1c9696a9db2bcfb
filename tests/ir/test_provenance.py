"""provenance: lines survive, several sources are remembered, weights take their reader's line."""

from __future__ import annotations

import torch
from torch import fx

from aios_compile.ir import provenance

aten = torch.ops.aten


def traced(line: int) -> dict[str, str]:
    return {"stack_trace": f'  File "/a/model.py", line {line}, in forward\n    x = {line}\n'}


def test_every_line_of_several_sources_is_remembered_once() -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in "abc"]
    for node, line in zip(nodes, (3, 4, 3)):
        node.meta = traced(line)
    new = graph.call_function(aten.add.Tensor, (nodes[0], nodes[1]))
    provenance.inherit(new, iter(nodes))
    assert provenance.source_lines(new) == (
        *("model.py:3 in forward: x = 3", "model.py:4 in forward: x = 4"),
    )
    assert provenance.source_file(new) == ("/a/model.py", 3)


def test_a_cast_of_a_weight_has_the_line_that_reads_the_weight() -> None:
    graph = fx.Graph()
    weight = graph.placeholder("weight")
    reader = graph.call_function(aten.mul.Tensor, (weight, weight))
    reader.meta = traced(7)
    cast = graph.call_function(aten._to_copy.default, (weight,))
    provenance.inherit(cast, [weight])
    assert provenance.source_line(cast) == "model.py:7 in forward: x = 7"


def test_the_layer_index_of_a_region_is_shown_as_a_star() -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"k": ("L['self'].model.layers[0].self_attn", object)}
    assert provenance.module_path(node) == "model.layers.*.self_attn"
