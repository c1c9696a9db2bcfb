"""The decorator that makes a function a pass: its name is the function's, typed nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import fx

from aios_compile.passes.context import PassContext

Numerics = Literal["exact", "reassociates", "lossy"]
PassFunction = Callable[[fx.Graph, PassContext], int]


@dataclass(frozen=True)
class PassInfo:
    """What the runner knows of a pass.

    numerics: "exact" keeps every bit in fp64 up to rounding of the same operations, "reassociates"
    changes the order of sums, "lossy" changes values within a stated budget. required: the compile
    fails without it; only optional passes may be reverted or disabled. target: "" for all targets.
    """

    name: str
    numerics: Numerics
    required: bool
    target: str
    doc: str

    def runs_on(self, target: str) -> bool:
        """Return whether the pass belongs to the pipeline of a target ("cpp", "triton")."""
        return self.target in ("", target)


def graph_pass(
    numerics: Numerics, *, required: bool = False, target: str = ""
) -> Callable[[PassFunction], PassFunction]:
    """Declare a pass: function(graph, context) -> number of rewrites."""

    def declare(function: PassFunction) -> PassFunction:
        info = PassInfo(function.__name__, numerics, required, target, function.__doc__ or "")
        cast(Any, function).info = info
        return function

    return declare


def info_of(function: PassFunction) -> PassInfo:
    """Return the declaration of a pass."""
    info = getattr(function, "info", None)
    assert isinstance(info, PassInfo), f"{function} is not a @graph_pass"
    return info
