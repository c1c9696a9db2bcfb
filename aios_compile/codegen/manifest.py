"""The manifest of an artefact folder: every file with its size and sha256, checked before use.

`manifest.json` is canonical JSON that carries the sha256 of its own content, so that a change of
any byte of any file, the manifest included, is found. `weights.bin` is too large to be hashed at
every start: the manifest fixes its size, and `weights.json` (itself hashed) its fast checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios_compile.errors import CacheError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
_MAX_MANIFEST_BYTES = 64 << 20
_ADVICE = "remove it (`aios cache rm`) and compile again"


def damaged(path: Path, what: str) -> CacheError:
    """Return the error for an artefact that does not hold what its manifest says."""
    return CacheError(f"{path}: {what}", advice=_ADVICE)


@dataclass(frozen=True)
class FileRecord:
    """One file: its size in bytes and its sha256; no sha256 for the weights."""

    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """What an artefact holds: `files` by relative path, the cache key and what it was made from."""

    key: str
    about: Mapping[str, Any]
    files: Mapping[str, FileRecord]


def canonical(value: Any) -> bytes:
    """Return JSON with one spelling: sorted keys, fixed spacing, no NaN."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=True)
    return text.encode() + b"\n"


def list_files(folder: Path) -> dict[str, os.stat_result]:
    """Return all files below `folder` by relative path; refuse links and special files."""
    found: dict[str, os.stat_result] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    pending.append(name + "/")
                elif stat.S_ISREG(info.st_mode):
                    found[name] = info
                else:
                    raise damaged(folder / name, "is a link or a special file, expected a file")
    return found


def write_manifest(folder: Path, key: str, about: Mapping[str, Any]) -> Manifest:
    """Hash every file of `folder` and write its manifest. `about` must be ready for JSON."""
    files = list_files(folder)
    files.pop(MANIFEST, None)
    records = {
        name: FileRecord(info.st_size, None if name == WEIGHTS else _sha256(folder / name))
        for name, info in files.items()
    }
    body = {
        "about": about,
        "files": {name: [record.bytes, record.sha256] for name, record in records.items()},
        "format": FORMAT_VERSION,
        "key": key,
    }
    digest = hashlib.sha256(canonical(body)).hexdigest()
    (folder / MANIFEST).write_bytes(canonical({**body, "sha256": digest}))
    return Manifest(key, about, records)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest after checking it against itself; CacheError names what is wrong."""
    path = folder / MANIFEST
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
        value = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, "is missing or cannot be read") from error
    if not isinstance(value, dict) or len(data) > _MAX_MANIFEST_BYTES:
        raise damaged(path, "is not a manifest")
    body = dict(value)
    digest = body.pop("sha256", None)
    try:
        same = canonical(value) == data and hashlib.sha256(canonical(body)).hexdigest() == digest
    except (ValueError, RecursionError) as error:
        raise damaged(path, "is not a manifest") from error
    if not same:
        raise damaged(path, "differs from its own sha256")
    if body.get("format") != FORMAT_VERSION:
        raise damaged(path, f"has format {body.get('format')!r}, expected {FORMAT_VERSION}")
    files = {name: FileRecord(size, sha256) for name, (size, sha256) in body["files"].items()}
    return Manifest(body["key"], body["about"], files)


def open_folder(folder: Path) -> Manifest:
    """Return the manifest if the folder has exactly its files, of its sizes, all of this user."""
    try:
        info = os.lstat(folder)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            raise damaged(folder, "is a link, no folder, or another user's")
        manifest = read_manifest(folder)
        present = list_files(folder)
    except OSError as error:
        raise damaged(folder, f"cannot be read ({error.strerror})") from error
    del present[MANIFEST]
    for name in sorted(present.keys() ^ manifest.files.keys()):
        what = "is not in the manifest" if name in present else "is missing"
        raise damaged(folder / name, what)
    for name, record in manifest.files.items():
        got = present[name]
        if got.st_size != record.bytes:
            raise damaged(folder / name, f"has {got.st_size} bytes, expected {record.bytes}")
        if got.st_uid != os.geteuid():
            raise damaged(folder / name, f"belongs to user {got.st_uid}")
    return manifest


def verify_folder(folder: Path, key: str) -> Manifest:
    """Check every file and (but for the weights) its content; CacheError says what differs."""
    manifest = open_folder(folder)
    if manifest.key != key:
        raise damaged(folder / MANIFEST, f"has key {manifest.key[:12]}, expected {key[:12]}")
    for name, record in manifest.files.items():
        if record.sha256 is not None and _sha256(folder / name) != record.sha256:
            raise damaged(folder / name, "differs from the sha256 of its manifest")
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 18))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
