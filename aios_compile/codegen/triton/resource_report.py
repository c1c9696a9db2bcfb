"""What the compiler says that kernels use: registers, shared memory, spills; kept by their text.

A kernel is compiled once for a target and a version of Triton; its numbers stay in a folder of the
private cache. Nothing is run, so a GPU is not needed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.compile_ahead import compile_ahead
from aios_compile.codegen.triton.occupancy import Usage
from aios_compile.errors import CodegenError

UNFIT = Usage(255, 1 << 30, 1, 1)  # of a kernel that does not compile: it needs more than there is


class ResourceReport:
    """Reads the usage of modules of one variant. num_compiled: how many were not known.

    folder: where numbers are kept; None: nowhere.
    """

    def __init__(self, target: str, jobs: int, folder: Path | None = None) -> None:
        self.target, self.jobs, self.folder = target, jobs, folder
        self.num_compiled = 0

    def __call__(self, sources: Sequence[KernelSource]) -> list[Usage]:
        """Return what the last launch of each module uses (a norm's launch may come before)."""
        with ThreadPoolExecutor(max(1, self.jobs)) as pool:
            return list(pool.map(self._one, sources))

    def _one(self, source: KernelSource) -> Usage:
        place = self._place(source)
        if place is not None and place.is_file():
            return Usage(**json.loads(place.read_text()))
        self.num_compiled += 1
        with tempfile.TemporaryDirectory(prefix="aios-report-") as folder:
            try:
                ((*_, last),) = compile_ahead([source], self.target, Path(folder), 1)
            except CodegenError:
                usage = UNFIT
            else:
                usage = last.usage()
        if place is not None:
            self._keep(place, usage)
        return usage

    def _place(self, source: KernelSource) -> Path | None:
        if self.folder is None:
            return None
        import triton

        text = f"{source.digest()} {self.target} {triton.__version__}"
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def _keep(self, place: Path, usage: Usage) -> None:
        """Write the numbers aside and put them in place at once: others may write them too."""
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as file:
            file.write(json.dumps(asdict(usage)))
        Path(file.name).replace(place)
