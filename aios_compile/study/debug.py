"""Print to stderr, while a model is compiled, what AIOS_DEBUG asks for: from stages to kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from aios_compile import env
from aios_compile.codegen.source import KernelSource
from aios_compile.passes.result import PassResult


def show_passes(results: Iterable[PassResult]) -> None:
    """At 1 print a line a pass, at 2 also which ops came and went, and what was refused and why."""
    level = env.DEBUG.get_int(0, 5)
    if level < 1:
        return
    for result in results:
        state = "" if result.kept else f"  not kept: {result.reason}"
        _say(f"{result.name}: {result.hits} hits, {result.milliseconds:.1f} ms{state}")
        if level >= 2:
            for name, delta in (result.op_deltas or {}).items():
                _say(f"    {delta:+d} {name}")
            for refusal in result.refusals:
                _say(f"    refused: {refusal}")


def show_level(folder: Path) -> None:
    """At 3 print the last level as a Python file, at 4 every level."""
    level = env.DEBUG.get_int(0, 5)
    files = sorted(folder.glob("*.py"))
    for path in files if level >= 4 else files[-1:] if level == 3 else []:
        _say(f"--- {path.name}\n{path.read_text()}")


def show_kernels(sources: Sequence[KernelSource], step: str) -> None:
    """At 4 print every generated kernel and the step."""
    if env.DEBUG.get_int(0, 5) >= 4:
        for source in sources:
            _say(f"--- {source.name}, {source.language}\n{source.text}")
        _say(f"--- step\n{step}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
