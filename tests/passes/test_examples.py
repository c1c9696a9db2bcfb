"""The Before and After blocks of every pass hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aios_compile.passes import examples
from aios_compile.passes.graph_pass import graph_pass, info_of

aten = torch.ops.aten


@pytest.mark.parametrize("function", examples.discover(), ids=lambda f: info_of(f).name)
def test_the_docstring_holds(function: Any) -> None:
    assert examples.check(function) > 0


def test_file_function_and_pass_share_a_name() -> None:
    for function in examples.discover():
        assert function.__module__.rsplit(".", 1)[-1] == function.__name__ == info_of(function).name


@graph_pass(numerics="exact")
def cancel_negations(graph: Any, context: Any) -> int:
    """Replace neg(neg(x)) by x.

    Before::

        def f(x: "f32[T, 8]"):
            return aten.relu.default(aten.neg.default(aten.neg.default(x)))

    After::

        def f(x: "f32[T, 8]"):
            return aten.relu.default(x)
    """
    hits = 0
    for node in graph.find_nodes(op="call_function", target=aten.neg.default):
        inner = node.args[0]
        if inner.target is aten.neg.default:
            node.replace_all_uses_with(inner.args[0])
            hits += 1
    return hits


def test_a_true_docstring_passes() -> None:
    assert examples.check(cancel_negations) == 1


def altered(old: str, new: str) -> Any:
    def function(graph: Any, context: Any) -> int:
        return cancel_negations(graph, context)

    assert old in (cancel_negations.__doc__ or "")
    function.__doc__ = (cancel_negations.__doc__ or "").replace(old, new)
    return graph_pass(numerics="exact")(function)


def test_a_docstring_that_promises_more_is_caught() -> None:
    with pytest.raises(examples.ExampleError, match="the docstring says"):
        examples.check(altered("aten.relu.default(x)\n", "aten.silu.default(x)\n"))


def test_an_example_that_does_not_fire_is_caught() -> None:
    with pytest.raises(examples.ExampleError, match="does not fire"):
        examples.check(altered("aten.neg.default(aten.neg.default(x))", "aten.neg.default(x)"))
