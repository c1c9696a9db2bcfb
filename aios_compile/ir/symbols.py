"""The few symbolic sizes and the fake tensors made of them.

T tokens, S sequences, R logit rows; NP, NB, NA lengths of the sampler's lists (penalties, biases,
allowed ids).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

# Trace hints: primes that no config uses as a size, so that no size is taken for another.
HINTS = {"T": 37, "S": 5, "R": 11, "NP": 13, "NB": 17, "NA": 19}


def new_fake_mode() -> FakeTensorMode:
    """Return a fake mode with a fresh shape environment."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def shape_env_of(mode: FakeTensorMode) -> ShapeEnv:
    assert mode.shape_env is not None, "the fake mode has no shape environment"
    return mode.shape_env


def name_size(size: Any, name: str) -> None:
    """Give the symbol of a SymInt its name (T, S, R) for printing and code generation."""
    env = size.node.shape_env
    names: dict[str, str] = getattr(env, "aios_size_names", {})
    names[str(size.node.expr)] = name
    env.aios_size_names = names


def size_names(mode: FakeTensorMode) -> dict[str, str]:
    """Return symbol text -> size name."""
    names: dict[str, str] = getattr(shape_env_of(mode), "aios_size_names", {})
    return names


def new_size(mode: FakeTensorMode, name: str) -> Any:
    """Return the SymInt called `name`, making its symbol when it does not exist yet."""
    env = shape_env_of(mode)
    sizes: dict[str, Any] = getattr(env, "aios_sizes", {})
    if name not in sizes:
        fake = mode.from_tensor(
            torch.empty(HINTS[name], device="meta"),
            source=ConstantSource(f"aios_{name}"),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC]),
        )
        sizes[name] = fake.shape[0]
        name_size(sizes[name], name)
        env.aios_sizes = sizes  # type: ignore[attr-defined]
    return sizes[name]


def adopt_size(mode: FakeTensorMode, name: str, size: Any) -> None:
    """Declare that an existing SymInt (the captured token count) is the size called `name`."""
    env = shape_env_of(mode)
    sizes: dict[str, Any] = getattr(env, "aios_sizes", {})
    sizes[name] = size
    env.aios_sizes = sizes  # type: ignore[attr-defined]
    name_size(size, name)


def new_fake(
    mode: FakeTensorMode, shape: Sequence[Any], dtype: torch.dtype, device: str = "cpu"
) -> torch.Tensor:
    """Return a contiguous fake tensor; shape entries are ints, SymInts or size names."""
    sizes = [new_size(mode, s) if isinstance(s, str) else s for s in shape]
    with mode:
        return torch.empty(sizes, dtype=dtype, device=device)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """Return the fake mode that the values of a graph belong to."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            assert isinstance(mode, FakeTensorMode)
            return mode
    raise AssertionError("no node of the graph carries a fake value")
