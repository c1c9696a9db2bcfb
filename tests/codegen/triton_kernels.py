"""Load generated Triton modules and call them on torch tensors, in the interpreter."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from aios_compile.codegen.expression import TORCH_DTYPES
from aios_compile.codegen.operand import dim_value
from aios_compile.codegen.source import KernelSource

E4M3 = torch.float8_e4m3fn


def load(source: KernelSource) -> ModuleType:
    """Write a kernel module to a file (Triton reads its source) and import it."""
    path = Path(tempfile.mkdtemp(prefix="aios-triton-")) / f"{source.symbol}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(source.symbol, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kernel:
    """A loaded module. Call it with sizes and tensors (inputs, then outputs)."""

    def __init__(self, source: KernelSource) -> None:
        self.source, self.module = source, load(source)

    def __call__(self, sizes: dict[str, int], *tensors: Tensor) -> None:
        """Run the kernel; the workspace is poisoned, counters must be zeros again afterwards.

        Tensors of e4m3 go in as their bits, as the signature has them.
        """
        source, full = self.source, {"T": 1, "S": 1, "R": 1, "P": 1, **sizes}
        assert len(tensors) == source.num_operands
        spaces = []
        for space in source.workspace:
            size = [dim_value(d, full) for d in space.shape]
            kind = TORCH_DTYPES[space.dtype]
            spaces.append(torch.full(size, float("nan") if kind.is_floating_point else -1).to(kind))
        counters = torch.zeros(source.counters, dtype=torch.int32)
        tensors = tuple(t.view(torch.uint8) if t.dtype == E4M3 else t for t in tensors)
        self.module.launch([*tensors, *spaces, *([counters] if source.counters else [])], **sizes)
        assert not counters.any(), "counters are left at zero"
