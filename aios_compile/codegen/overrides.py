"""Edited kernels: files that stand in for generated text of the same name. Torch-free.

`<cache>/overrides/NAME.cpp` replaces the kernel NAME. The name ends in digits of the generated
text, so an edit is used for that very text only, and is left alone when the compiler writes
another. Whether it is right is found out by study/verify_override.py when a model is compiled.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from aios_compile.codegen.private_folder import cache_errors, make_private, write_atomically
from aios_compile.errors import ConfigError

FOLDER, SUFFIX = "overrides", ".cpp"
MAX_BYTES = 1 << 20


def folder_of(root: Path) -> Path:
    """Return the overrides folder of a cache."""
    return root / FOLDER


def digests(root: Path) -> dict[str, str]:
    """Return {kernel name: sha256} of all edits: a part of every artefact's key."""
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(root)}


def texts(root: Path) -> dict[str, str]:
    """Return {kernel name: text} of all edits. Raises CacheError when the folder is not private."""
    files = _files(root)
    if files:
        make_private(folder_of(root))
    return {path.stem: path.read_text(encoding="utf-8") for path in files}


def write(root: Path, name: str, text: str) -> Path:
    """Store an edit of the kernel `name`; return its file."""
    if not re.fullmatch(r"\w+", name):
        raise ConfigError(f"{name!r} is no name of a kernel")
    if len(text.encode()) > MAX_BYTES:
        raise ConfigError(f"the text of {name} has more than {MAX_BYTES} bytes")
    make_private(folder_of(root))
    path = folder_of(root) / f"{name}{SUFFIX}"
    write_atomically(path, text.encode())
    return path


def remove(root: Path, name: str) -> bool:
    """Take an edit back; return whether there was one."""
    path = folder_of(root) / f"{name}{SUFFIX}"
    if path not in _files(root):
        return False
    with cache_errors(path):
        path.unlink()
    return True


def _files(root: Path) -> list[Path]:
    found = sorted(folder_of(root).glob(f"*{SUFFIX}"))
    return [p for p in found if p.is_file() and p.stat().st_size <= MAX_BYTES]
