"""The two targets of code generation: C++ for a CPU, Triton for a GPU (or its interpreter)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from aios_compile.codegen.emit_kernels import Emitted, emit_kernels
from aios_compile.codegen.lower import Planner, lower
from aios_compile.codegen.program import Program
from aios_compile.ir.module import IRModule

Family = Literal["cpp", "triton"]
SUFFIXES = {"cpp": ".cpp", "triton": ".py"}


def family(device: str) -> Family:
    """Return which target runs on a device of config.CompileOptions."""
    return "triton" if device.partition(":")[0] in ("cuda", "interpreter") else "cpp"


def emit(
    module: IRModule,
    device: str,
    on_progress: Callable[[int, int], None] | None = None,
    card: str = "",
    joined: str = "",
    tuning: Any = None,
) -> Emitted:
    """Emit every kernel of a level-3 module for a device; card: "cuda:90" and the like.

    tuning: codegen.triton.choice.Tuning, or None for the model's choice of configurations.
    joined: not empty if they become phases of one launch, which share a number of warps. Raises
    CodegenError naming the model line, or a card that is not known.
    """
    if family(device) == "cpp":
        from aios_compile.codegen.cpp.emitters import EMITTERS

        return emit_kernels(module, EMITTERS, on_progress)
    from aios_compile.codegen.triton.cards import DEFAULT, card_of
    from aios_compile.codegen.triton.emitters import emitters_for
    from aios_compile.codegen.triton.persistent import WARPS as PHASE_WARPS

    gpu = card_of(card) if card else DEFAULT
    if joined:
        gpu = replace(gpu, warps=(PHASE_WARPS,))
    return emit_kernels(module, emitters_for(gpu, tuning), on_progress, packs=False)


def lower_for(
    module: IRModule,
    emitted: Emitted,
    sizes: Mapping[str, int],
    settings: Mapping[str, Any],
    planner: Planner,
) -> Program:
    """Return the program for settings["family"]; a GPU's begins and ends with kernels of its own.

    settings["persistent_decode"]: join each layer's launches, for this device ("" for not). Raises
    CodegenError as codegen.lower and join_launches do.
    """
    program = lower(module, emitted, sizes, settings, planner)
    if settings["family"] == "cpp":
        return program
    from aios_compile.codegen.triton.cards import card_of
    from aios_compile.codegen.triton.frame_step import frame_step
    from aios_compile.codegen.triton.join_launches import join_launches

    if device := settings.get("persistent_decode"):
        card = card_of(settings["target"])
        program = join_launches(program, emitted, card, compiles=device != "interpreter")
    return frame_step(program, emitted)
