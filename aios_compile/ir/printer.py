"""Write a level as a Python file that runs: a function a region and kernel, with model lines.

The file needs torch and the op table of this package, nothing else. Run it and it prints the shape
and a checksum of every result on random values; `checksums` gives the same lines for the program
in memory.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from aios_compile.ir import evaluate, inputs, provenance
from aios_compile.ir.inputs import Step, Value
from aios_compile.ir.module import IRModule, body_of, placeholders
from aios_compile.ir.snapshot import dtype_text
from aios_compile.ir.symbols import size_names

STEP = inputs.mixed(5)
WHOLE_STEP = inputs.whole(5)
_HEAD = '''"""{title}

T tokens in the step, S sequences, R rows whose logits are wanted. `f32[T, 64]` is a dtype and a
shape. A comment names the line of the model that the nodes below it compute. Run this file with
Python: it prints a checksum of every result on random values.
"""

import operator

import torch

from aios_compile.ir import ops
from aios_compile.ir.inputs import Step, Value, sample, summary

aten, aios = torch.ops.aten, torch.ops.aios
assert ops.TABLE  # registers the aios operators
'''
_MAIN = """

OUTPUTS = {outputs}
VALUES = [
{values}
]
STEP = {step}


def main(seed: int = {seed}) -> None:
    with torch.no_grad():
        results = program(**sample(VALUES, STEP, seed))
    for name, result in zip(OUTPUTS, results):
        print(summary(name, result))


if __name__ == "__main__":
    main()
"""


def to_python(module: IRModule, title: str = "", seed: int = 0) -> str:
    """Return the source of a script that runs this level on random values."""
    names = size_names(module.mode)
    parts = [
        _HEAD.format(title=title or f"Level {int(module.level)}, {module.level.name.lower()}.")
    ]
    for name, graph_module in module.graphs().items():
        parts += _kernels(graph_module, name, names)
        parts.append(_function(_region_name(name), graph_module, name, names))
    values = "\n".join(f"    {_value_text(v)}," for v in inputs.describe(module))
    step = step_of(module)
    parts.append(_MAIN.format(outputs=output_names(module), values=values, step=step, seed=seed))
    return "\n".join(parts)


def checksums(module: IRModule, seed: int = 0) -> list[str]:
    """Run the program in memory on the values of its printed file; return what that prints."""
    values = inputs.sample_inputs(module, step_of(module), seed)
    arguments = [values[n.name] for n in placeholders(module.root.graph)]
    with torch.no_grad():
        results = evaluate.call(module.root, arguments, exact_halves=True)
    return [inputs.summary(n, r) for n, r in zip(output_names(module), results)]


def step_of(module: IRModule) -> Step:
    """Return the batch that a level is run on: mixed once the program is paged."""
    return STEP if "slots" in module.inputs.values() else WHOLE_STEP


def output_names(module: IRModule) -> list[str]:
    """Return a name for every output: those of the module, and "next <state>" for states."""
    count = len(module.root.graph.output_node().args[0])  # type: ignore[arg-type]
    names = [*module.outputs, *(f"output {i}" for i in range(len(module.outputs), count))]
    for state, index in module.states.items():
        if index >= 0:
            names[index] = f"next {state}"
    return names[:count]


def _region_name(region: str) -> str:
    return f"region_{region}" if region else "program"


def _kernel_name(region: str, target: str) -> str:
    return "_".join(filter(None, ("kernel", region, target.replace(".", "_"))))


def _kernels(owner: fx.GraphModule, region: str, names: Mapping[str, str]) -> list[str]:
    """Return a function for each kernel body that a graph calls."""
    found = {}
    for node in owner.graph.nodes:
        if node.op == "call_module" and not body_of(node).meta.get("aios_region"):
            name = _kernel_name(region, str(node.target))
            found[name] = _function(name, body_of(node), region, names)
    return list(found.values())


def _function(
    name: str, graph_module: fx.GraphModule, region: str, names: Mapping[str, str]
) -> str:
    kind = graph_module.meta.get("kernel")
    lines = ["", f"def {name}("]
    for node in placeholders(graph_module.graph):
        lines.append(f"    {node.name}{_annotation(node, names)},")
    lines.append("):")
    if kind:
        lines.append(f'    """Kernel of kind {kind}."""')
    previous = ""
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            lines.append(f"    return {_argument(node.args[0])}")
            continue
        source = "; ".join(provenance.source_lines(node))
        if source and source != previous:
            lines.append(f"    # {source}")
            previous = source
        lines.append(f"    {node.name}{_annotation(node, names)} = {expression(node, region)}")
    return "\n".join([*lines, ""])


def _annotation(node: fx.Node, names: Mapping[str, str]) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    sizes = ", ".join(str(s) for s in inputs.shape_of(value, names))
    return f': "{dtype_text(value.dtype)}[{sizes}]"'


def expression(node: fx.Node, region: str) -> str:
    """Return a call as Python text. region: whose kernels it may call, "" for the root's."""
    if node.target is operator.getitem:
        return f"{_argument(node.args[0])}[{_argument(node.args[1])}]"
    arguments = [_argument(a) for a in node.args]
    arguments += [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    joined = ", ".join(arguments)
    if node.op == "call_module":
        is_region = body_of(node).meta.get("aios_region")
        target = str(node.target)
        name = _region_name(target) if is_region else _kernel_name(region, target)
        return f"{name}({joined})"
    if node.op == "call_method":
        return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
    return f"{_target(node.target)}({joined})"


def _target(target: Any) -> str:
    text = str(target)
    if isinstance(target, torch._ops.OpOverload):
        return text if text.startswith(("aten.", "aios.")) else f"torch.ops.{text}"
    module = getattr(target, "__module__", "") or "torch"
    return f"{'operator' if module == '_operator' else module}.{target.__name__}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(map(_argument, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return 'torch.device("cpu")'  # values are real here, wherever the model was captured
    return repr(value)


def _value_text(value: Value) -> str:
    fields = (value.name, value.kind, value.source)
    return f"Value({', '.join(map(repr, fields))}, {value.dtype}, {value.shape!r})"
