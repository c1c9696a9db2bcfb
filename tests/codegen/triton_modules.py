"""Load generated Triton modules and run them in the interpreter on poisoned buffers."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from aios_compile.codegen.expression import TORCH_DTYPES
from aios_compile.codegen.operand import dim_value
from aios_compile.codegen.source import KernelSource

FOLDER = Path(tempfile.mkdtemp(prefix="aios-test-triton-"))


def load(source: KernelSource) -> ModuleType:
    """Import a module from its text."""
    path = FOLDER / f"{source.symbol}_{source.digest()[:8]}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(source: KernelSource, module: ModuleType, tensors: Sequence[Tensor], **sizes: int) -> None:
    """Launch on inputs and outputs; the workspace is full of NaN, counters are left at zero."""
    assert len(tensors) == source.num_operands
    spaces = [
        poisoned([dim_value(d, sizes) for d in o.shape], TORCH_DTYPES[o.dtype])
        for o in source.workspace
    ]
    counters = torch.zeros(source.counters, dtype=torch.int32)
    module.launch([*tensors, *spaces, *([counters] if source.counters else [])], **sizes)
    assert not counters.any()


def poisoned(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of NaN, or of -7."""
    return torch.full(list(shape), float("nan") if dtype.is_floating_point else -7, dtype=dtype)
