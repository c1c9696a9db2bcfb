"""Compile a model's C++ kernels for an instruction set that this machine may lack.

    report = compile_for("Qwen3-0.6B", "neondot", Path("out"), {})

No weight is read. `out` gets every kernel's text and the step's, the headers that they include,
and the library that they make. For another architecture the cross-compiler makes it
(aarch64-linux-gnu-g++ on the PATH, or AIOS_CXX).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios_compile.codegen import artefact
from aios_compile.codegen.cpp import build
from aios_compile.codegen.cpp.step import emit_step
from aios_compile.config import CompileOptions
from aios_compile.errors import CodegenError
from aios_compile.study.kernel_table import KernelRow, kernel_rows
from aios_compile.study.plan_model import Planned, open_without_weights, plan_model

HEADERS = "include"


@dataclass(frozen=True)
class CpuReport:
    """What was compiled for a target: each kernel with its object's bytes, and the library."""

    target: str
    compiler: str
    library: Path
    kernels: tuple[tuple[KernelRow, int], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        kernels = [{**row.as_dict(), "code_bytes": size} for row, size in self.kernels]
        known = {"target": self.target, "compiler": self.compiler, "library": self.library}
        return {**known, "kernels": kernels}


def target_of(name: str) -> build.Target:
    """Return an instruction set by name; raises CodegenError with the known names."""
    try:
        return build.Target.named(name)
    except KeyError as error:
        raise CodegenError(error.args[0], advice="--target cpu:neondot, for example") from error


def plan_for(model: str | Path, target: build.Target, keywords: Mapping[str, Any]) -> Planned:
    """Capture and plan a model for an instruction set; no weights are needed."""
    options = CompileOptions.parse({**keywords, "device": "cpu"})
    return plan_model(open_without_weights(model, options), options, cpu=target)


def compile_for(
    model: str | Path, name: str, out: Path, keywords: Mapping[str, Any], jobs: int | None = None
) -> CpuReport:
    """Compile every kernel of a model and its step for the target `name` into `out`.

    Raises CodegenError for a name that is not known, BuildError without a compiler for it.
    """
    target = target_of(name)
    compiler = build.find_compiler(target)
    planned = plan_for(model, target, keywords)
    sources = planned.emitted.sources
    step = emit_step(planned.program, tuple(sources))
    texts = out / artefact.KERNELS
    texts.mkdir(parents=True, exist_ok=True)
    for source in sources:
        (texts / f"{source.name}.cpp").write_text(source.text, encoding="utf-8")
    (out / artefact.STEP).write_text(step, encoding="utf-8")
    (out / HEADERS).mkdir(exist_ok=True)
    for header in build.HEADER_FOLDER.glob("*.h"):
        shutil.copy(header, out / HEADERS)
    with tempfile.TemporaryDirectory(prefix="aios-objects-") as folder:
        pairs: list[build.Source] = [*sources, ("step", step)]
        objects = build.build_objects(pairs, Path(folder), target, jobs)
        sizes = {s.symbol: o.stat().st_size for s, o in zip(sources, objects)}
        library = build.link(objects, out / artefact.LIBRARY, target)
    rows = kernel_rows(planned.module, planned.emitted, planned.program)
    kernels = tuple((row, sizes[row.symbol]) for row in rows)
    return CpuReport(target.name, compiler.version, library, kernels)
