"""q_out = rope(norm(q)); caches[slots] = rope(norm(k)), v: all between projection and attention.

Norms and rotation are optional each (Llama has no norms, a module with learned positions no
rotation). q, k and v are slices of the merged projection; the caches are updated in place. Saves
writing and reading q and k twice and four launches a layer. Layouts, bytes and items: head_rows.py.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from aios_compile.codegen.cpp import head_rows
from aios_compile.codegen.cpp.head_rows import Head, HeadRowsSpec, Rotation, Write
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.strided import RESHAPES, body_lines, resolve
from aios_compile.ir import ops

assert ops.TABLE, "the op table registers the aios operators"

WRITES = (torch.ops.aios.kv_write.default, torch.ops.aios.quantized_kv_write.default)


def single_output(body: fx.GraphModule) -> fx.Node | None:
    """Return the node of a body's only output, looking through reshapes of a computed value."""
    (result,) = body.graph.output_node().args
    values = result if isinstance(result, (tuple, list)) else (result,)
    return computed(values[0]) if len(values) == 1 else None


def computed(value: Any) -> fx.Node | None:
    """Return the node that computes a value, looking through reshapes."""
    while isinstance(value, fx.Node) and value.target in RESHAPES:
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None


def rotation_of(node: fx.Node, operands: Sequence[Operand]) -> Rotation | None:
    """Return the tables of an aios.rope node, None when they are not inputs of the body."""
    _, cos, sin, interleaved = node.args
    views = [head_rows.without_leading_ones(resolve(v, operands), 2) for v in (cos, sin)]
    if views[0] is None or views[1] is None:
        return None
    return Rotation(views[0], views[1], bool(interleaved))


def head_of(value: Any, operands: Sequence[Operand]) -> tuple[Head, Rotation | None] | None:
    """Read [rope]([rms_norm](view of an input)) backwards; None when it is anything else."""
    rotation, eps, weight, rotated = None, None, None, False
    node = computed(value)
    if node is not None and node.target is torch.ops.aios.rope.default:
        rotation, rotated = rotation_of(node, operands), True
        if rotation is None:
            return None
        value = node.args[0]
        node = computed(value)
    if node is not None and node.target is torch.ops.aios.rms_norm.default:
        source_value, weight_value, eps_value, _ = node.args
        weight = resolve(weight_value, operands)
        if weight_value is not None and (weight is None or weight.operand.strides != (1,)):
            return None
        eps = float(eps_value)  # type: ignore[arg-type]
        value = source_value
    source = head_rows.three_dimensional(resolve(value, operands))
    return None if source is None else (Head(source, eps, weight, rotated), rotation)


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> HeadRowsSpec | None:
    """Return the spec of a body whose outputs are the caches and at most one q, else None."""
    (result,) = body.graph.output_node().args
    values = list(result) if isinstance(result, (tuple, list)) else [result]
    inputs = len(operands) - len(values)
    nodes = [computed(v) for v in values]
    parts: dict[int, int] = {}  # k cache, v cache, k scales, v scales -> place among the outputs
    writes = set()
    for i, node in enumerate(nodes):
        if node is not None and node.target is operator.getitem:
            write = node.args[0]
            if isinstance(write, fx.Node) and write.target in WRITES:
                parts[cast(int, node.args[1])] = i
                writes.add(write)
    others = [i for i in range(len(nodes)) if i not in parts.values()]
    if len(writes) != 1 or len(others) > 1:
        return None
    write = writes.pop()
    k_value, v_value, *states, slots_value = write.args
    if sorted(parts) != list(range(len(states))):
        return None
    k = head_of(k_value, operands)
    q = head_of(values[others[0]], operands) if others else None
    v = head_rows.three_dimensional(resolve(v_value, operands))
    slots, written = resolve(slots_value, operands), [resolve(s, operands) for s in states]
    caches = [state for state in written if state is not None]
    if k is None or v is None or slots is None or len(caches) < len(states):
        return None
    rotations = {r for r in (k[1], q[1] if q else None) if r is not None}
    if (others and q is None) or len(rotations) > 1:
        return None
    if q is not None and q[0].eps is None and not q[0].rotated:
        return None  # q would be a copy, or a view, of an input
    spec = HeadRowsSpec(
        "qk_norm_rope_kv_write" if others else "kv_write",
        q[0] if q else None,
        (inputs + others[0], operands[inputs + others[0]]) if others else None,
        k[0],
        Write(v, slots, tuple(caches), tuple(inputs + parts[i] for i in sorted(parts))),
        rotations.pop() if rotations else None,
        len(operands),
        inputs,
        body_lines(body),
    )
    return spec if head_rows.fits(spec) else None


def reference(spec: HeadRowsSpec, body: fx.GraphModule, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Compute the outputs in eager PyTorch: the body itself is the definition of correct."""
    return tuple(body(*tensors))


def emit(spec: HeadRowsSpec) -> KernelSource:
    """Return the kernel's text."""
    return head_rows.emit(spec)
