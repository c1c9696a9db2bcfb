"""Resolve the files of a model folder without ever leaving it.

A file may be a link only inside the folder, or in a Hugging Face cache from
`models--X/snapshots/<revision>/` to `models--X/blobs/`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from aios_compile.errors import CheckpointError


def member(folder: Path, name: str) -> Path:
    """Return the path of the regular file `name` in `folder`; CheckpointError where that is
    unsafe.
    """
    if not isinstance(name, str) or not name or name != os.path.basename(name) or "\\" in name:
        raise CheckpointError(f"{folder}: {name!r} is not a plain file name in the model folder")
    if name in (".", "..") or not name.isprintable():  # no NUL, no half of a surrogate pair
        raise CheckpointError(f"{folder}: {name!r} is not a plain file name in the model folder")
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{path}: missing or unreadable ({_reason(error)})") from None
    if not _belongs(folder.resolve(), real):
        raise CheckpointError(
            f"{path}: a link that leaves the model folder, to {real}",
            advice="copy the file into the folder",
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    return path


def exists(folder: Path, name: str) -> bool:
    """Say whether the folder has an entry of that name, a broken link included."""
    return os.path.lexists(folder / name)


def _belongs(folder: Path, real: Path) -> bool:
    if real.is_relative_to(folder):
        return True
    in_hub_cache = folder.parent.name == "snapshots"
    return in_hub_cache and real.parent == folder.parent.parent / "blobs"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
