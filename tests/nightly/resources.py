"""Registers and shared memory of compiled kernels, pinned in text files beside the tests.

A file holds for the compiler that its first line names; with another one only spills are held.
`UPDATE_RESOURCES=1` writes the rows of what is run anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import triton

from aios_compile.codegen.triton.compile_ahead import Binary

COMPILER = f"triton {triton.__version__}"
DIGEST = re.compile(r"_[0-9a-f]{8,10}(?=_|$)")


def hold(file: Path, key: str, binaries: Iterable[Binary]) -> None:
    """Hold the binaries of one key to their pins in a file, or pin them."""
    used = {
        f"{key} {_variant(b)}": f"{b.registers} registers {b.shared_bytes} shared" for b in binaries
    }
    rows = _rows(file)
    own = {k: v for k, v in rows.items() if k.startswith(f"{key} ")}
    if os.environ.get("UPDATE_RESOURCES"):
        kept = {k: v for k, v in rows.items() if k not in own} | used
        text = "\n".join(f"{k} = {v}" for k, v in sorted(kept.items()))
        file.write_text(f"{COMPILER}\n{text}\n")
    elif rows:
        assert used == own, sorted(used.items() ^ own.items())


def _variant(binary: Binary) -> str:
    """Return what a module's name and digest leave of a kernel's, and its number of rows."""
    name, most = DIGEST.split(binary.kernel)[-1].lstrip("_"), str(binary.most or "any")
    return name if name.endswith(f"_{most}") else f"{name}_{most}".lstrip("_")


def _rows(file: Path) -> dict[str, str]:
    """Return {key: resources} if this compiler wrote them."""
    lines = file.read_text().splitlines() if file.exists() else [""]
    rows = [line.split(" = ") for line in lines[1:]]
    return dict(map(tuple, rows)) if lines[0] == COMPILER else {}
