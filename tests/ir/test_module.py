"""Recipes, regions and dead code."""

from __future__ import annotations

import pytest
import torch

from aios_compile.ir.module import Recipe, drop_dead, outputs, placeholders
from aios_compile.ir.symbols import new_fake, new_fake_mode, new_size, size_names
from tests.passes import level2

TENSORS = {"a": torch.arange(4.0), "b": torch.ones(4)}


def test_a_composed_recipe_reads_each_name_once_and_prints_as_python() -> None:
    a, b = Recipe.identity("a"), Recipe.identity("b")
    both = Recipe.compose(lambda x, y: torch.cat((x, y)), [a, b])
    scaled = Recipe.compose(lambda x, y: torch.cat((x * 2, y)), [both, a])
    assert scaled.names == ("a", "b")
    assert torch.equal(
        scaled.run(TENSORS), torch.cat((TENSORS["a"] * 2, TENSORS["b"] * 2, TENSORS["a"]))
    )
    assert both.text() == "cat([checkpoint['a'], checkpoint['b']])"
    assert a.is_identity() and not both.is_identity()


def test_dead_region_inputs_outputs_and_weights_go() -> None:
    module = level2.program()
    region = module.regions()["layer"]
    (result,) = outputs(region.graph)
    output = region.graph.output_node()
    output.args = ((result, placeholders(region.graph)[0]),)
    for call in module.calls("layer"):
        call.meta["val"] = (*call.meta["val"], call.meta["val"][0])
    before = len(placeholders(region.graph))
    weight = next(n for n in placeholders(region.graph) if n.name == "norm1")
    weight.replace_all_uses_with(next(n for n in placeholders(region.graph) if n.name == "norm2"))
    drop_dead(module)
    assert len(outputs(region.graph)) == 1
    assert len(placeholders(region.graph)) == before - 1
    assert not any(n.endswith("norm1") for n in module.weights)
    assert all(len(c.args) == before - 1 for c in module.calls("layer"))


def test_regions_are_listed_once_and_the_outer_graph_last() -> None:
    module = level2.program(num_layers=3)
    assert list(module.graphs()) == ["layer", ""]
    assert len(module.calls("layer")) == 3


def test_sizes_are_made_once_and_keep_their_names() -> None:
    mode = new_fake_mode()
    x = new_fake(mode, ("T", 8), torch.float32)
    y = new_fake(mode, (new_size(mode, "S") + 1, "T"), torch.int64)
    assert x.shape[0] is new_size(mode, "T") or str(x.shape[0]) == str(y.shape[1])
    assert sorted(size_names(mode).values()) == ["S", "T"]
    assert x.stride() == (8, 1)


def test_an_unknown_size_has_no_hint() -> None:
    with pytest.raises(KeyError):
        new_fake(new_fake_mode(), ("Q",), torch.float32)
