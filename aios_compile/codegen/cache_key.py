"""What an artefact depends on, hashed; and, for a miss, which of it changed.

The key covers the content of the model's files, every option that changes the artefact, the
variables that steer the compiler, the compiler's own code, the versions of Python and torch (read
without importing torch), the C++ compiler and the CPU's features. Hashes of large files are
remembered by (path, size, mtime, ctime, inode), so a second start reads none of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aios_compile import env
from aios_compile.codegen.cpp.build import cpu_features, find_compiler
from aios_compile.codegen.manifest import canonical
from aios_compile.codegen.private_folder import write_atomically
from aios_compile.config import CompileOptions
from aios_compile.errors import BuildError, CheckpointError

# The files of a model folder that can change what is compiled; README and licences cannot.
MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model")
_KEYED_VARIABLES = (env.BISECT, env.VERIFY, env.EAGER, env.SELECT_KERNELS)
# A file that changed this recently may change again within one tick of the file system's clock.
_SETTLED_NS = 2_000_000_000
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class CacheKey:
    """The parts of a key: {"options": {"dtype": "auto", ...}, "model": {file: sha256}, ...}.

    `source` says where the model came from; it helps to explain a miss and is not hashed.
    """

    source: str
    parts: Mapping[str, Mapping[str, Any]]

    @cached_property
    def digest(self) -> str:
        """Return the sha256 of the parts, in hex: the name of the artefact."""
        return hashlib.sha256(canonical(self.parts)).hexdigest()

    def about(self) -> dict[str, Any]:
        """Return what the manifest keeps, from which `explain_miss` reads."""
        return {"source": self.source, "parts": self.parts}


class HashMemo:
    """sha256 of files, remembered in one JSON file of the private cache folder.

    A damaged or stale memo costs time, never correctness: an entry counts only while the file's
    path, size, inode, mtime and ctime are the same.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dirty = False
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            value = {}
        self._known: dict[str, list[Any]] = value if isinstance(value, dict) else {}

    def sha256(self, path: Path) -> str:
        """Return the sha256 of the file's content."""
        stamp = _stamp(path)
        known = self._known.get(str(path))
        if isinstance(known, list) and known[:-1] == stamp and isinstance(known[-1], str):
            return known[-1]
        with open(path, "rb") as file:
            digest = _sha256_of(file)
        if time.time_ns() - max(stamp[1], stamp[2]) > _SETTLED_NS and _stamp(path) == stamp:
            self._known[str(path)] = [*stamp, digest]
            self._dirty = True
        return digest

    def save(self) -> None:
        """Write what was learned. Of two processes that save at once, the later one's is kept."""
        if self._dirty:
            kept = {path: row for path, row in self._known.items() if os.path.exists(path)}
            write_atomically(self._path, json.dumps(kept).encode())
            self._dirty = False


def _stamp(path: Path) -> list[int]:
    info = os.stat(path)
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]


def _sha256_of(file: Any) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that the key covers, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix in MODEL_SUFFIXES and p.is_file())


def hash_files(files: Iterable[Path], memo: HashMemo) -> dict[str, str]:
    """Return {file name: sha256}, hashed side by side; CheckpointError if one cannot be read.

    Of two files with one name (another tokenizer's) the later is named by its whole path.
    """
    paths = list(files)
    try:
        with ThreadPoolExecutor(2) as pool:
            digests = list(pool.map(memo.sha256, (path.resolve() for path in paths)))
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    hashes: dict[str, str] = {}
    for path, digest in zip(paths, digests):
        hashes[path.name if path.name not in hashes else str(path)] = digest
    return hashes


def compute_key(
    source: str,
    model: Mapping[str, str],
    options: CompileOptions,
    memo: HashMemo,
    overrides: Mapping[str, str] | None = None,
    card: str = "",
) -> CacheKey:
    """Return the key of the model whose content has the hashes `model`, under `options`.

    `source` is the model's folder or hub id; files of another tokenizer belong into `model` too.
    overrides: hashes of the edited kernels (codegen/overrides.py). card: the GPU's ("cuda:90"), and
    its name, for which kernels are measured.
    """
    steering = {v.name: v.get() for v in _KEYED_VARIABLES}
    parts = {
        "model": dict(model),
        "options": options.key_fields(),
        "environment": steering,
        "overrides": dict(overrides or {}),
        "compiler": {"code": compiler_digest()},
        "versions": versions(),
        "machine": {**machine(), **({"gpu": card} if card else {})},
    }
    memo.save()
    return CacheKey(source, parts)


def compiler_digest() -> str:
    """Return the sha256 over every source file of this package, with its relative path."""
    digest = hashlib.sha256()
    for name in sorted(_source_files(_PACKAGE)):
        content = (_PACKAGE / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _source_files(package: Path) -> list[str]:
    return [
        os.path.relpath(os.path.join(here, name), package)
        for here, _, names in os.walk(package)
        for name in names
        if name.endswith((".py", ".h", ".txt", ".json"))
    ]


def versions() -> dict[str, str]:
    """Return the versions of Python and packages, from their metadata; torch is not imported."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy"):
        found[package] = installed_version(package)
    return found


def installed_version(package: str) -> str:
    """Return a distribution's version, or "absent"; from the folder's name where that has it."""
    for entry in sys.path:
        try:
            names = os.listdir(entry or ".")
        except OSError:
            continue
        for name in names:
            if name.startswith(f"{package}-") and name.endswith(".dist-info"):
                return name[len(package) + 1 : -len(".dist-info")]
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def machine() -> dict[str, str]:
    """Return the architecture, a hash of the CPU's features, and the C++ compiler."""
    features = " ".join(sorted(cpu_features()))
    return {
        "architecture": platform.machine(),
        "cpu": hashlib.sha256(features.encode()).hexdigest()[:16],
        "c++": compiler_version(),
    }


def compiler_version() -> str:
    """Return path and version of the C++ compiler, or "absent": a cached start needs none."""
    try:
        compiler = find_compiler()
    except BuildError:
        return "absent"
    return f"{compiler.path} {compiler.version}"


def explain_miss(key: CacheKey, entries: Iterable[Mapping[str, Any]]) -> str:
    """Return why no artefact has `key`: what differs from the nearest one of the same model.

    `entries` are the `about` of all artefacts. The same model means the same content or, with other
    content, the same source.
    """
    candidates = [entry for entry in entries if isinstance(entry.get("parts"), Mapping)]
    same = [e for e in candidates if e["parts"].get("model") == key.parts["model"]]
    same = same or [e for e in candidates if e.get("source") == key.source]
    if not same:
        return "never compiled"
    nearest = min(
        same, key=lambda entry: sum(map(len, _changed(entry["parts"], key.parts).values()))
    )
    return _phrase(nearest["parts"], key.parts) or "never compiled"


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return {part: names of its fields that differ}, in the order of `new`."""
    changed = {}
    for part, fields in new.items():
        before = old.get(part, {})
        names = sorted(n for n in {*fields, *before} if fields.get(n) != before.get(n))
        if names:
            changed[part] = names
    return changed


def _phrase(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return what changed, for people: "options changed: dtype (auto -> float32)"."""
    phrases = []
    for part, names in _changed(old, new).items():
        if part == "compiler":
            phrases.append("compiler code changed")
        elif part == "model":
            phrases.append(f"model files changed: {', '.join(names)}")
        else:
            before = old.get(part, {})
            moves = [f"{n} ({before.get(n)} -> {new[part].get(n)})" for n in names]
            phrases.append(f"{part} changed: {', '.join(moves)}")
    return "; ".join(phrases)
