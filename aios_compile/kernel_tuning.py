"""Whom the emitters of a GPU's kernels ask about configurations: the compiler, the GPU's ledger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from aios_compile import env
from aios_compile.config import CompileOptions

TIMED_CANDIDATES = 2  # of each range of rows: they are compiled only to be timed


def tuning_for(
    options: CompileOptions,
    card: str,
    cache_root: Path | None = None,
    notes: list[str] | None = None,
) -> Any:
    """Return whom to ask about the configurations of a GPU's kernels, or None.

    The compiler's numbers are kept in the cache. notes: told of the GPU's ledger; without it, the
    kernels are for any GPU of the card's kind, and no GPU is asked.
    """
    if not card or options.device == "interpreter":
        return None
    from aios_compile.codegen.triton.choice import Tuning
    from aios_compile.codegen.triton.resource_report import ResourceReport

    tuning = Tuning() if notes is None else measured_tuning(options, card, notes)
    if options.compile_candidates:
        folder = None if cache_root is None else cache_root / "resources"
        report = ResourceReport(card, options.threads(), folder)
        tuning = replace(tuning, report=report, limit=options.compile_candidates)
    return tuning if tuning != Tuning() else None


def measured_tuning(options: CompileOptions, card: str, notes: list[str]) -> Any:
    """Return the ledger of the GPU that is here, and candidates for what it lacks.

    Neither with AIOS_SELECT_KERNELS=0, nor for persistent launches, whose phases share their warps.
    """
    from aios_compile.codegen.triton import kernel_ledger
    from aios_compile.codegen.triton.choice import Tuning
    from aios_compile.runtime.torch_device import gpu_name

    if not env.SELECT_KERNELS.get_int(0, 3600) or options.joined_launches():
        return Tuning()
    import triton

    ledger, line = kernel_ledger.shipped(gpu_name(options.device), card, triton.__version__)
    notes.append(f"select_kernels: {line}")
    return Tuning(ledger=ledger, timed=0 if env.EAGER.get_int(0, 1) else TIMED_CANDIDATES)
