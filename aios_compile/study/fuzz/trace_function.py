"""Trace a plain function into level 1, without a model around it.

The annotations of its parameters say what they are, as in the docstrings of the passes: "f32[T,
64]" is an activation, "weight bf16[64, 64]" a checkpoint weight, "input i64[T]" a runtime input. T,
S and R are symbolic.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx, maybe_enable_thunkify

from aios_compile.capture import torch_private
from aios_compile.capture.assemble import _free_of_sizes
from aios_compile.errors import CaptureError
from aios_compile.ir.module import IRModule, Level, Recipe, placeholders
from aios_compile.ir.symbols import new_fake, new_fake_mode, shape_env_of
from aios_compile.passes.examples import DTYPES

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = {"T": 7, "S": 2, "R": 3}


@dataclass(frozen=True)
class Annotation:
    """One parameter of a traced function."""

    kind: str  # "activation", "weight" or "input"
    dtype: torch.dtype
    shape: tuple[int | str, ...]


def parse(text: str) -> Annotation:
    """Read "weight f32[128, 64]"."""
    found = re.fullmatch(r"(?:(weight|input) )?(\w+)\[(.*)\]", text.strip("\"' "))
    assert found, f"cannot read the annotation {text!r}"
    sizes = [s.strip() for s in found[3].split(",") if s.strip()]
    shape = tuple(int(s) if s.isdigit() else s for s in sizes)
    return Annotation(found[1] or "activation", DTYPES[found[2]], shape)


def trace(function: Callable[..., Any], seed: int = 0) -> IRModule:
    """Return level 1 of a function whose parameters are annotated; weights get seeded values.

    Raises CaptureError for an operator that cannot be traced for any T.
    """
    annotations = {
        n: parse(p.annotation) for n, p in inspect.signature(function).parameters.items()
    }
    mode = new_fake_mode()
    fakes = [new_fake(mode, a.shape, a.dtype) for a in annotations.values()]

    def run(*args: Any) -> Any:
        with maybe_enable_thunkify():  # what is computed with sizes is recorded where it is used
            result = function(*args)
        return result if isinstance(result, tuple) else (result,)

    known = inspect.signature(make_fx).parameters
    extra: Any = {"record_stack_traces": True} if "record_stack_traces" in known else {}
    forgetful = torch_private.forgetful(mode)
    python = enable_python_dispatcher()  # for torch 2.11, as in capture
    with forgetful, mode, tracing(TracingContext(mode)), python, torch.no_grad():
        functional = dispatch_functionalize(run)
        root = make_fx(functional, decomposition_table=_table(), **extra)(*fakes)
    for symbol, size in shape_env_of(mode).replacements.items():
        raise CaptureError(f"tracing decided that {symbol} is {size}: an operator needs its value")
    _free_of_sizes(root)
    module = IRModule(torch_private.lazy_graph_module(root, root.graph), Level.CAPTURED)
    generator = torch.Generator().manual_seed(seed)
    for node, (name, annotation) in zip(placeholders(module.root.graph), annotations.items()):
        node._rename(name)
        node.target = node.name
        if annotation.kind == "weight":
            module.weights[node.name] = Recipe.identity(name)
            module.tensors[name] = random(annotation, generator)
        elif annotation.kind == "input":
            module.inputs[node.name] = name
    module.root.graph.eliminate_dead_code()
    module.root.recompile()
    return module


@functools.lru_cache(maxsize=1)
def _table() -> dict[Any, Any]:
    """Return the decompositions; to collect them takes as long as to trace a small function."""
    return torch_private.decompositions()


def random(annotation: Annotation, generator: torch.Generator, sizes: Any = SIZES) -> Tensor:
    """Return seeded values for a parameter: normal ones, or zeros and ones."""
    shape = [sizes[s] if isinstance(s, str) else s for s in annotation.shape]
    if annotation.dtype not in FLOATS:
        return torch.randint(0, 2, shape, generator=generator).to(annotation.dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(annotation.dtype)
