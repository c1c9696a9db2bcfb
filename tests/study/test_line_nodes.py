"""Lines of a Triton kernel and the nodes that they compute, found out from the text alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from aios_compile.codegen.triton import kv_write_attention, linear
from aios_compile.ir import ops
from aios_compile.study.line_nodes import annotated, nodes_of_lines
from tests.codegen.harness import make_body
from tests.codegen.test_triton_kv_write_attention import bf16, f32, made

assert ops.TABLE
aios, aten = torch.ops.aios, torch.ops.aten


def owners(text, body, part):
    """Return the names of the nodes of each line that contains a part."""
    nodes = nodes_of_lines(text, body)
    lines = [i for i, line in enumerate(text.split("\n"), 1) if part in line]
    assert lines, f"no line has {part!r}"
    return [tuple(node.name for node in nodes.get(i, ())) for i in lines]


def test_norm_product_and_tail_of_a_linear():
    def body(x, gain, w):
        y = aios.linear.default(aios.rms_norm.default(x, gain, 1e-6, True), w)
        gate, up = aten.split.Tensor(y, 96, 1)
        return aios.gated_activation.default(gate, up, "silu")

    shapes = {"x": (("T", 64), f32), "gain": ((64,), bf16), "w": ((192, 64), bf16)}
    graph, operands = make_body(body, shapes)
    spec = linear.spec_of(graph, operands)
    assert spec is not None
    text = linear.emit(spec).text
    norm, product, tail = "rms_norm_default", "linear_default", "gated_activation_default"
    assert set(owners(text, graph, "gain = tl.load(gain_1")) == {(norm,)}
    assert set(owners(text, graph, "squares0 += ")) == {(norm,)}
    assert set(owners(text, graph, "row0 = tl.load(w0")) == {(product,)}
    assert set(owners(text, graph, "tl.store(out0")) == {(tail,)}
    assert (product, tail) in owners(text, graph, "sum0 *= scale"), "they cannot be told apart"
    assert set(owners(text, graph, "i1 = tl.program_id(0)")) == {()}
    marked = annotated(text, nodes_of_lines(text, graph)).split("\n")
    assert [line.partition("  # <-")[0] for line in marked] == text.split("\n")
    assert any(f"# <- {norm}" in line for line in marked)


def test_a_function_that_serves_queries_and_keys_belongs_to_both():
    graph, built = made(True, True, f32)
    text = built.source.text
    norms = ("rms_norm_default", "rms_norm_default_1")
    ropes, attends = ("rope_default", "rope_default_1"), ("paged_attention_default",)
    assert owners(text, graph, "scale = 1.0 / tl.sqrt(tl.sum(x * x, 1)") == [norms]
    assert owners(text, graph, "x = x * c + (sign") == [ropes]
    assert owners(text, graph, "k = tl.load(keys") == [attends], "a page that was written is read"
    assert owners(text, graph, "acc = dot(p, v") == [attends]
    (write,) = owners(text, graph, "tl.store(v_cache + place")
    assert write == ("kv_write_default",)
    assert kv_write_attention.NEW_TOKENS == 32, "what `made` changes is put back"


def test_what_a_workspace_holds_is_followed():
    """The normed rows of a wide linear go through a buffer between two kernels."""
    text = """
import triton
@triton.jit
def first(x_0, w_1, out0_2, normed_3, T, S, R, P):
    tl.store(normed_3 + T, tl.load(x_0))
@triton.jit
def second(x_0, w_1, out0_2, normed_3, T, S, R, P):
    y = tl.load(normed_3)
    z = tl.dot(y, tl.load(w_1))
    tl.store(out0_2, z)
def launch(operands, T=1, S=1, R=1, P=1):
    return operands
"""

    def body(x, w):
        return aios.linear.default(aten.relu.default(x), w)

    graph, _ = make_body(body, {"x": (("T", 8), f32), "w": ((4, 8), f32)})
    assert owners(text, graph, "tl.store(normed_3") == [("relu_default",)]
    assert owners(text, graph, "y = tl.load") == [("relu_default",)]
    assert owners(text, graph, "z = tl.dot") == [("linear_default",)]
    assert owners(text, graph, "return operands") == [()]
