"""Run the Before and After blocks of a pass's docstring: its documentation is its first test.

A block is a function over aten and aios ops. Annotations say what its parameters are: an activation
"f32[T, 64]", a "weight f32[128, 64]", a runtime "input i64[T]", a "state f32[64, 2, 16, 16]" (a
cache; its next values are the last outputs, in order). An inner function under @kernel("kind") is a
kernel body. The pass must turn the graph of Before into one isomorphic to After, and then find
nothing more.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from aios_compile.ir import ops
from aios_compile.ir.module import (
    IRModule,
    Level,
    Recipe,
    body_of,
    drop_dead,
    is_kernel_call,
    outputs,
    placeholders,
)
from aios_compile.ir.symbols import new_fake, new_fake_mode, new_size
from aios_compile.passes.context import PassContext, PassOptions
from aios_compile.passes.example_reader import ExampleFunction, read
from aios_compile.passes.graph_pass import PassFunction, info_of

assert ops.TABLE, "the op table must be registered"
DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "b8": torch.bool,
}
# What the examples assume.
OPTIONS = PassOptions(quantization="int8_g32_f16", quantize_kv="int8", bf16_dot=True)
_ANNOTATION = re.compile(r"(?:(weight|input|state)\s+)?(\w+)\[(.*)\]")


def discover() -> list[PassFunction]:
    """Return the passes of the package: a file that declares one is named after it."""
    found = []
    for entry in sorted(Path(__file__).parent.glob("*.py")):
        if re.search(r"^@graph_pass", entry.read_text(encoding="utf-8"), re.MULTILINE):
            module = importlib.import_module(f"aios_compile.passes.{entry.stem}")
            found.append(getattr(module, entry.stem))
    return found


@dataclass(frozen=True)
class Example:
    """The two blocks of one docstring."""

    before: str
    after: str


class ExampleError(AssertionError):
    """A docstring does not say what its pass does."""


def example_of(function: PassFunction) -> Example | None:
    """Return the blocks of a pass's docstring, or None when it has none."""
    doc = inspect.cleandoc(info_of(function).doc)
    if "Before::" not in doc or "After::" not in doc:
        return None
    return Example(_block(doc, "Before"), _block(doc, "After"))


def _block(doc: str, title: str) -> str:
    lines = doc.split(f"{title}::\n", 1)[1].lstrip("\n").split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    body = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            break
        body.append(line)
    return textwrap.dedent("\n".join(body)).strip()


def check(function: PassFunction, options: PassOptions | None = None) -> int:
    """Run the example of a pass; return its rewrites. Raises ExampleError with both graphs."""
    example = example_of(function)
    name = info_of(function).name
    if example is None:
        raise ExampleError(f"{name}: the docstring has no Before and After block")
    module, wanted = build(example.before), build(example.after)
    hits = apply(function, module, options)
    if not hits:
        raise ExampleError(f"{name}: the example does not fire\n{canonical(module)}")
    got, expected = canonical(module), canonical(wanted)
    if got != expected:
        raise ExampleError(f"{name} gives\n{got}\nthe docstring says\n{expected}")
    if again := apply(function, module, options):
        raise ExampleError(
            f"{name}: a second run still makes {again} rewrites\n{canonical(module)}"
        )
    return hits


def apply(function: PassFunction, module: IRModule, options: PassOptions | None = None) -> int:
    """Run a pass on the graphs of a program and clean up; return its rewrites."""
    hits = 0
    for region in list(module.graphs()):
        context = PassContext(module, region, options or OPTIONS)
        hits += function(context.graph_module.graph, context)
    drop_dead(module)
    module.root.graph.lint()
    return hits


def build(source: str) -> IRModule:
    """Trace one block into a program whose outer graph it is."""
    recorder = _Recorder()
    scope: dict[str, Any] = {
        "torch": torch,
        "aten": torch.ops.aten,
        "aios": torch.ops.aios,
        "kernel": recorder.kernel,
    }
    return recorder.module(read(source, scope))


class _Recorder:
    """Turns calls of the block's function into nodes with fake values."""

    def __init__(self) -> None:
        self.mode = new_fake_mode()
        self.graph = fx.Graph()
        self.root = fx.GraphModule(torch.nn.Module(), self.graph)
        self.result = IRModule(self.root, Level.SEMANTIC)

    def module(self, function: ExampleFunction) -> IRModule:
        graph = self.root.graph
        tracer = _FakeTracer(graph, self.mode)
        values = [
            self._parameter(tracer, name, annotation)
            for name, annotation in function.parameters.items()
        ]
        value = function(*values)
        results = value if isinstance(value, tuple) else (value,)
        graph.output(tuple(r.node for r in results))
        for i, name in enumerate(self.result.states):
            self.result.states[name] = len(results) - len(self.result.states) + i
        count = len(results) - len(self.result.states)
        rest = (f"output_{i}" for i in range(1, count))
        self.result.outputs = ("logits", *rest)[:count]
        _finish(graph)
        self.root.recompile()
        return self.result

    def _parameter(self, tracer: _FakeTracer, name: str, annotation: str) -> fx.Proxy:
        found = _ANNOTATION.fullmatch(annotation.strip())
        assert found, f"cannot read the annotation {annotation!r} of {name}"
        kind, dtype, sizes = found.groups()
        shape = [self._size(s.strip()) for s in sizes.split(",") if s.strip()]
        node = self.root.graph.placeholder(name)
        node.meta["val"] = new_fake(self.mode, shape, DTYPES[dtype])
        if kind == "weight":
            self.result.weights[node.name] = Recipe.identity(name)
        elif kind == "input":
            self.result.inputs[node.name] = name
        elif kind == "state":
            self.result.states[node.name] = -1
        return fx.Proxy(node, tracer)

    def _size(self, text: str) -> Any:
        if text.isdigit():
            return int(text)
        name, _, more = text.partition("+")
        size = new_size(self.mode, name.strip())
        return size + int(more) if more else size

    def kernel(self, kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return the decorator that makes an inner function a kernel body."""

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: fx.Proxy) -> Any:
                return self._kernel_call(kind, function, arguments)

            return run

        return decorate

    def _kernel_call(
        self, kind: str, function: Callable[..., Any], arguments: tuple[fx.Proxy, ...]
    ) -> Any:
        graph = fx.Graph()
        tracer = _FakeTracer(graph, self.mode)
        inner = []
        for argument in arguments:
            node = graph.placeholder(argument.node.name)
            node.meta["val"] = argument.node.meta["val"]
            inner.append(fx.Proxy(node, tracer))
        value = function(*inner)
        single = not isinstance(value, tuple)
        results = (value,) if single else value
        graph.output(results[0].node if single else tuple(r.node for r in results))
        _finish(graph)
        body = fx.GraphModule(self.root, graph)
        body.meta["kernel"] = kind
        name = function.__name__
        while hasattr(self.root, name):
            name += "_"
        self.root.add_submodule(name, body)
        call = self.root.graph.call_module(name, tuple(a.node for a in arguments))
        vals = tuple(r.node.meta["val"] for r in results)
        call.meta["kernel"], call.meta["val"] = kind, vals[0] if single else vals
        proxy = fx.Proxy(call, arguments[0].tracer)
        return proxy if single else tuple(_item(proxy, i) for i in range(len(vals)))


def _item(value: Any, index: int) -> Any:
    return value[index]


class _FakeTracer(fx.proxy.GraphAppendingTracer):
    """Records calls and computes their fake values."""

    def __init__(self, graph: fx.Graph, mode: Any) -> None:
        super().__init__(graph)
        self.mode = mode

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if node.op == "call_function":
            values, named = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            assert callable(node.target)
            with self.mode, torch.no_grad():
                node.meta["val"] = node.target(*values, **named)
        return node


def _finish(graph: fx.Graph) -> None:
    """Merge equal getitems, as captured graphs have them; give every node a source line."""
    seen: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        node.meta.setdefault("source_lines", (f"docstring: {node.name}",))
        if node.target is operator.getitem:
            first = seen.setdefault(node.args, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


class _Ref(str):
    """A value's name inside the text of arguments."""

    def __repr__(self) -> str:
        return str(self)


def canonical(module: IRModule) -> str:
    """Return one text for isomorphic graphs: values are named in the order of their need."""
    return _canonical(module.root, module)


def _canonical(graph_module: fx.GraphModule, module: IRModule | None) -> str:
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for i, node in enumerate(placeholders(graph_module.graph)):
        names[node] = node.name if module is not None else f"in{i}"

    def visit(node: fx.Node) -> str:
        if node not in names:
            text = _call_text(node, visit)
            names[node] = f"v{len(lines)}"
            lines.append(f"{names[node]} = {text}")
        return names[node]

    results = [visit(node) for node in outputs(graph_module.graph)]
    lines.append(f"return {', '.join(results)}")
    if module is not None:
        kinds = {**module.inputs, **dict.fromkeys(module.weights, "weight")}
        kinds |= {name: f"state -> {index}" for name, index in module.states.items()}
        lines += sorted(f"{name}: {kind}" for name, kind in kinds.items())
    return "\n".join(lines)


def _call_text(node: fx.Node, visit: Callable[[fx.Node], str]) -> str:
    if is_kernel_call(node):
        arguments = ", ".join(visit(a) for a in node.args)  # type: ignore[arg-type]
        body = textwrap.indent(_canonical(body_of(node), None), "    ")
        return f"kernel {node.meta.get('kernel')}({arguments})\n{body}"
    args, kwargs = _with_defaults(node)
    args, kwargs = fx.node.map_arg((args, kwargs), lambda n: _Ref(visit(n)))
    named = "".join(f", {k}={v!r}" for k, v in sorted(kwargs.items()))
    return f"{node.target}({', '.join(map(repr, args))}{named})"


def _with_defaults(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Drop trailing arguments and keywords that are the operator's defaults."""
    args, kwargs = list(node.args), dict(node.kwargs)
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return tuple(args), kwargs
    for declared in schema.arguments[len(args) :]:
        if declared.name in kwargs and not declared.kwarg_only:
            args.append(kwargs.pop(declared.name))
        else:
            break
    while args and schema.arguments[len(args) - 1].has_default_value():
        if (
            isinstance(args[-1], fx.Node)
            or args[-1] != schema.arguments[len(args) - 1].default_value
        ):
            break
        args.pop()
    return tuple(args), {k: v for k, v in kwargs.items() if v is not None}
