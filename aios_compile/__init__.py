"""aios_compile: a compiler-driven LLM inference engine whose every step can be read.

Importing this package imports no torch: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aios_compile.api import load_and_compile
    from aios_compile.async_engine import AsyncEngine
    from aios_compile.compiled_model import CompiledModel
    from aios_compile.errors import AiosError
    from aios_compile.sampling_params import SamplingParams

__all__ = [
    "AiosError",
    "AsyncEngine",
    "CompiledModel",
    "SamplingParams",
    "__version__",
    "load_and_compile",
]

_HOMES = {
    "AiosError": "errors",
    "AsyncEngine": "async_engine",
    "CompiledModel": "compiled_model",
    "SamplingParams": "sampling_params",
    "load_and_compile": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"aios_compile.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
