# ruff: noqa: F821
"""What passes read of a node: parts of the last dimension."""

import pytest
import torch

from aios_compile.passes.match import part
from tests.passes.helpers import trace

aten = torch.ops.aten
PARTS = {
    "to the end, left out": ((1, 200), (200, 400, 1)),
    "to the end, as ATen writes it": ((1, 200, 2**63 - 1), (200, 400, 1)),
    "from the end": ((-1, -300, -100, 2), (100, 300, 2)),
    "of another dimension": ((0, 0, 1), None),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_wide_rows(name):
    arguments, expected = PARTS[name]

    def f(x: "f32[T, 400]"):
        return torch.relu(aten.slice.Tensor(x, *arguments))

    graph = trace(f).root.graph
    (node,) = graph.find_nodes(op="call_function", target=aten.slice.Tensor)
    found = part(node)
    assert (found and tuple(found)[1:]) == expected
    assert found is None or found.source is node.args[0]
