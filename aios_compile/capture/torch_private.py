"""The private torch names that capturing needs, in one file. Tested on torch 2.13 and 2.11.

What differs: torch 2.13 reuses a region's trace (flat capture time) and inlines a region that is
called once unless told not to; torch 2.11 does neither, and drops the message of an error that a
layer's forward raises (hides_message).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch._dynamo as dynamo
from torch import fx
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import variables
from torch._dynamo.convert_frame import fullgraph_capture
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import traceback as fx_traceback
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

from aios_compile.capture.decompositions import OWN, conv1d

try:  # torch 2.13
    from torch._dynamo.variables import invoke_subgraph
except ImportError:  # torch 2.11: it has no reuse that could fail
    invoke_subgraph = None

_ELIGIBLE = "is_reuse_eligible"
_RAISED = re.compile(r"raised exception (\w+)\((.*)\)$", re.MULTILINE)
_CONSTANT = re.compile(r"""ConstantVariable\(str: ('[^']*'|"[^"]*")\)""")  # so in torch 2.11
INVOKE_SUBGRAPH = torch.ops.higher_order.invoke_subgraph

# Composites that passes want whole, or that core ATen would only make longer.
KEPT = ("silu", "gelu", "leaky_relu", "elu", "softplus", "hardtanh", "addmm")


def compile_region(function: Callable[..., Any], max_entries: int) -> Callable[..., Any]:
    """Mark a layer's forward as a compile region that may be reused `max_entries` times."""
    parameters = inspect.signature(torch.compiler.nested_compile_region).parameters
    if "max_reuse_entries" in parameters:
        return torch.compiler.nested_compile_region(  # type: ignore[no-any-return]
            function, max_reuse_entries=max_entries
        )
    return torch.compiler.nested_compile_region(function)  # type: ignore[no-any-return]


@contextlib.contextmanager
def capture_settings() -> Iterator[None]:
    """Dynamo's settings while capturing: symbolic token count, constant floats, no inlining; whole
    encoder layers as the operators that they are made of."""
    wanted = {
        "specialize_float": True,
        "assume_static_by_default": False,
        "automatic_dynamic_shapes": False,  # what was traced before may not decide a size here
        "inline_single_use_invoke_subgraph": False,
    }
    known = {k: v for k, v in wanted.items() if hasattr(dynamo.config, k)}
    settings, lazy = dynamo.config.patch(known), _use_lazy_graph_module(True)
    causal = mock.patch.object(torch.nn.modules.transformer, "_detect_is_causal_mask", _is_causal)
    convolution = mock.patch.object(torch.nn.functional, "conv1d", conv1d)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        times = dynamo_timed("aios_capture")
        with torch.no_grad(), settings, lazy, causal, convolution, get_metrics_context(), times:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _is_causal(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Believe the caller of an nn.TransformerEncoder; torch compares the mask's values."""
    return is_causal is True


@contextlib.contextmanager
def forgetful(mode: FakeTensorMode) -> Iterator[None]:
    """Let a fake mode keep no results of operations.

    To keep one costs as much as to compute it, which a small function that is traced once does not
    pay back (0.11 s, not 0.14). Captured models do: without, 28 layers are lowered in 6 s, not 1.
    """
    kept, mode.cache_enabled = mode.cache_enabled, False
    try:
        yield
    finally:
        mode.cache_enabled = kept


def lazy_graph_module(owner: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a graph module, copies of it too, whose Python is generated when it is called.

    Passes copy and change graphs all the time and hardly ever call one: the graph is interpreted.
    """
    with _use_lazy_graph_module(True):
        return _make_graph_module(owner, graph)


def full_graph(model: torch.nn.Module, kwargs: dict[str, Any]) -> Any:
    """Trace model(**kwargs) into one graph; return dynamo's backend input (graph, examples)."""
    spaces = {id(g): g for g in _global_spaces(model)}
    before = {key: set(space) for key, space in spaces.items()}
    try:
        with _only_dynamic(kwargs):
            return _traced(model, kwargs)
    finally:  # dynamo leaves helper names in the model's module globals
        for key, space in spaces.items():
            for name in set(space) - before[key]:
                if name.startswith(("__compiled_fn_", "__builtins_dict_")):
                    del space[name]


@contextlib.contextmanager
def _only_dynamic(kwargs: dict[str, Any]) -> Iterator[None]:
    """Give every tensor but the arguments its own sizes: dynamo takes those of a tensor that is
    neither parameter nor buffer (an attribute, a global, a closure's) for sizes that may change.
    """
    always_static = variables.builder.tensor_always_has_static_shape

    def is_static(tensor: Any, *args: Any, **others: Any) -> Any:
        static, reason = always_static(tensor, *args, **others)
        return static or all(tensor is not given for given in kwargs.values()), reason

    with mock.patch.object(variables.builder, always_static.__name__, is_static):
        yield


@contextlib.contextmanager
def traced_instead(functions: Mapping[Callable[..., Any], Callable[..., Any]]) -> Iterator[None]:
    """Let dynamo trace other functions for some, whatever name the model knows them by."""
    table = variables.builder.VariableBuilder._id_dispatch()

    def other(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda builder, value: variables.UserFunctionVariable(function)

    with mock.patch.dict(table, {id(old): other(new) for old, new in functions.items()}):
        yield


def _traced(model: torch.nn.Module, kwargs: dict[str, Any]) -> Any:
    try:
        return fullgraph_capture(model, (), kwargs).backend_input
    except AssertionError as error:
        # torch 2.13: a region that reads an attribute of a weight (`weight.T`) cannot be reused,
        # and saving it for reuse asserts. Traced a call at a time, equal regions are still one.
        if "Freevar has no source" not in str(error) or not hasattr(invoke_subgraph, _ELIGIBLE):
            raise
    with mock.patch.object(invoke_subgraph, _ELIGIBLE, lambda *args, **kwargs: False):
        return fullgraph_capture(model, (), kwargs).backend_input


def hides_message(error: BaseException | None) -> bool:
    """Return whether dynamo told the class of an exception that a layer raised, but no message.

    torch 2.11 does so in a region. Traced in the outer graph, the same exception has its message.
    """
    return "raised exception ExceptionVariable(" in str(error)


def reason_of(error: Exception) -> str:
    """Return a line of why a trace failed: what the module itself raised, or dynamo's reason."""
    text = str(error).strip()
    raised = _RAISED.search(text)
    if raised is not None:
        told = _CONSTANT.sub(r"\1", raised[2]).strip("[]")
        return f"it raises {raised[1]}({told})"[:440]
    first, _, rest = text.partition("\n\n")
    if first.endswith("Got graph break/error:"):  # of a region: the reason comes after it
        first = rest.partition("\n\n")[0]
    return f"{type(error).__name__}: {first}".replace("\n", " ")[:440]


def _global_spaces(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        space = getattr(forward, "__globals__", None)
        if space is not None:
            yield space


@functools.cache
def decompositions() -> dict[Any, Any]:
    """Return the core ATen table without the ops that stay whole; to collect it takes 0.05 s.

    Ops that write in place are left to functionalization: decomposed, they fail on symbolic sizes.
    """
    table = dict(core_aten_decompositions())
    for overload in list(table):
        schema = getattr(overload, "_schema", None)
        kept = schema is not None and schema.name.removeprefix("aten::") in KEPT
        if kept or (schema is not None and schema.is_mutable):
            del table[overload]
    table.update(OWN)
    return table


def lower(graph_module: fx.GraphModule, fakes: list[Any], mode: Any) -> fx.GraphModule:
    """Trace a dynamo graph again as functional core ATen; node meta and regions survive."""

    def run(*args: Any) -> Any:  # the interpreter, not a call: it carries the node meta over
        return fx.Interpreter(graph_module).run(*args)

    kept = fx_traceback.preserve_node_meta()
    # torch 2.11: matmul's C++ asks for sizes as numbers, its Python form takes symbols
    python = enable_python_dispatcher()
    with mode, tracing(TracingContext(mode)), kept, python, torch.no_grad():
        return make_fx(dispatch_functionalize(run), decomposition_table=decompositions())(*fakes)
