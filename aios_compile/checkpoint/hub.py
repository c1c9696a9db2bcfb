"""Find a model: a folder or GGUF file here, or a Hugging Face hub id, the local cache first."""

from __future__ import annotations

import re
from pathlib import Path

from aios_compile.errors import CheckpointError

PATTERNS = ("*.json", "*.safetensors", "*.jinja")  # never pickles, never code
MAX_NAME = 255  # characters of a file name, on every common file system
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


def resolve(model: str | Path, local_files_only: bool = False) -> Path:
    """Return the folder of a model, or its GGUF file; download it unless it is there. Raises
    CheckpointError.

    A hub id may name a revision: `owner/name@revision`. A cached model is used as it is; nothing
    asks the hub whether there is a newer one.
    """
    if max(map(len, str(model).split("/"))) > MAX_NAME:
        raise CheckpointError(f"{str(model)[:200]!r}... is neither a folder nor a hub id")
    folder = Path(model).expanduser()
    if str(model) and (folder.is_dir() or (folder.suffix == ".gguf" and folder.is_file())):
        return folder
    if folder.suffix == ".gguf":
        raise CheckpointError(f"{folder}: no such file")
    repository, _, revision = str(model).partition("@")
    if not HUB_ID.fullmatch(repository) or ".." in repository or "--" in repository:
        raise CheckpointError(
            f"{str(model)[:200]!r} is neither a folder nor a hub id",
            advice="give a model folder, a GGUF file, owner/name, or FILE.py:NAME to a command",
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"{str(model)!r} is no folder here, and without huggingface_hub it cannot be looked up",
            advice="pip install huggingface_hub, or pass the path of a folder",
        ) from None

    def snapshot(offline: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(PATTERNS),
                local_files_only=offline,
            )
        )

    try:
        cached = snapshot(offline=True)
        if any(cached.glob("*.safetensors")) and (cached / "config.json").exists():
            return cached
    except LocalEntryNotFoundError:
        pass  # not cached: download below, unless that is forbidden
    if local_files_only:
        raise CheckpointError(
            f"{str(model)!r} is not in the local cache and local_files_only is set",
            advice="download it once without local_files_only",
        )
    try:
        return snapshot(offline=False)
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors: offline, not found, ...
        raise CheckpointError(
            f"{str(model)!r} cannot be downloaded ({type(error).__name__}: {str(error)[:300]})",
            advice="check the name and the connection, or pass the path of a folder",
        ) from None
