"""provenance: lines survive, several sources are remembered, weights take their reader's line."""

from __future__ import annotations

from pathlib import Path

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


def test_lines_of_shared_files_and_of_capture_stand_back_for_the_models() -> None:
    frame = '  File "{}", line {}, in forward\n    x = {}\n'
    site = "/v/lib/site-packages"
    capture = str(Path(provenance.__file__).parents[1] / "capture" / "foreign.py")
    shared = [f"{site}/torch/nn/functional.py", f"{site}/transformers/integrations/moe.py", capture]
    model = f"{site}/transformers/models/olmoe/modeling_olmoe.py"
    for path in shared:
        node = fx.Graph().placeholder("x")
        node.meta = {"stack_trace": frame.format(model, 5, 5) + frame.format(path, 9, 9)}
        assert provenance.source_line(node) == "modeling_olmoe.py:5 in forward: x = 5"
        node.meta = {"stack_trace": frame.format(path, 9, 9)}
        assert provenance.source_line(node).endswith("py:9 in forward: x = 9"), "better than none"


def test_the_layer_index_of_a_region_is_shown_as_a_star() -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"k": ("L['self'].model.layers[0].self_attn", object)}
    assert provenance.module_path(node) == "model.layers.*.self_attn"
