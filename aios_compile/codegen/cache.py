"""The store of artefacts: private to the user, content-addressed, verified, atomically written.

::

    <cache>/artefacts-v1/          0700, owned by the user
        entries/<key>/             one artefact each, read-only, complete from the moment it is seen
        staging/<key>.<random>/    being written, under the key's build lock; or a scratch folder
        staging/trash.<random>/    renamed out of entries, being removed
        locks/<key>.build          exclusive: the one process that compiles this key
        locks/<key>.use            shared: a process that runs it; exclusive: to remove it.
                                   Its modification time is when the entry was last used
        hashes.json                remembered hashes of model files

An entry appears by one rename and goes by one rename, so nothing half-written is ever seen. What
a killed process leaves in staging belongs to a key whose build lock is free: the next process
collects it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aios_compile import env
from aios_compile.codegen.cache_key import CacheKey, HashMemo, explain_miss
from aios_compile.codegen.manifest import (
    Manifest,
    list_files,
    read_manifest,
    verify_folder,
    write_manifest,
)
from aios_compile.codegen.private_folder import (
    FileLock,
    cache_errors,
    make_private,
    remove_tree,
    sync,
    sync_tree,
)
from aios_compile.errors import CacheError

STORE = "artefacts-v1"
_MAX_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True)
class Miss:
    """No artefact: `reason` is for the user; `damaged` says that one was found and removed."""

    reason: str
    damaged: bool = False


@dataclass(frozen=True)
class Entry:
    """One artefact in the store. `last_used` is in seconds since the epoch."""

    key: str
    path: Path
    source: str
    bytes: int
    last_used: float
    in_use: bool


def default_root(cache_dir: str | None = None) -> Path:
    """Return the cache folder: the option, AIOS_CACHE_DIR, or `aios` in the user's cache folder."""
    chosen = cache_dir or env.CACHE_DIR.get()
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "aios"
    except RuntimeError as error:
        advice = "set HOME or AIOS_CACHE_DIR"
        raise CacheError("there is no home folder to put the cache in", advice=advice) from error


class ArtefactCache:
    """The artefacts below `root`. Keep it as long as an artefact is used: it holds the use locks.

    Any number of processes and threads may work on one store.
    """

    def __init__(self, root: Path) -> None:
        limit_bytes()  # a bad value is told now, not after a long compile
        self.root = make_private(make_private_parent(root) / STORE)
        for name in ("entries", "staging", "locks"):
            make_private(self.root / name)
        self._held: dict[str, FileLock] = {}
        self._building: dict[Path, FileLock] = {}
        self._mutex = threading.Lock()

    def memo(self) -> HashMemo:
        """Return the remembered hashes of model files."""
        return HashMemo(self.root / "hashes.json")

    def lookup(self, key: CacheKey) -> Path | Miss:
        """Return the verified artefact of `key`, in use from now on, or why there is none.

        Every file is hashed but the weights, which `artefact.verify_weights` does. A damaged
        entry is removed.
        """
        path = self._entry(key.digest)
        with cache_errors(path):
            lock = self._lock(key.digest, "use")
            lock.take(shared=True)
            if not os.path.lexists(path):
                lock.close()
                return Miss(self._why(key))
            try:
                verify_folder(path, key.digest)
            except (CacheError, OSError) as error:
                lock.close()
                self._discard(path)
                what = error.message if isinstance(error, CacheError) else str(error)
                return Miss(f"damaged and removed: {what}", damaged=True)
            lock.touch()
        self._hold(key.digest, lock)
        return path

    def begin(self, key: CacheKey, on_wait: Callable[[], None] | None = None) -> Path | None:
        """Return an empty staging folder, or None if another process published the key meanwhile.

        Waits while another process or thread compiles the same key (`on_wait` is called first).
        """
        with cache_errors(self.root):
            self._collect()
            lock = self._lock(key.digest, "build")
            if not lock.take(wait=False):
                if on_wait is not None:
                    on_wait()
                lock.take()
            if os.path.lexists(self._entry(key.digest)):
                lock.close()
                return None
            return self._stage(key.digest, lock)

    def scratch(self) -> Path:
        """Return an empty folder for an artefact without a key (a module in memory).

        It goes with `abandon` or `close`; if this process is killed, the next one collects it.
        """
        name = f"scratch-{secrets.token_hex(8)}"
        with cache_errors(self.root):
            self._collect()
            lock = self._lock(name, "build")
            lock.take()
            return self._stage(name, lock)

    def _stage(self, owner: str, lock: FileLock) -> Path:
        """Make the staging folder of the holder of a build lock."""
        staging = self.root / "staging" / f"{owner}.{secrets.token_hex(8)}"
        try:
            staging.mkdir(mode=0o700)
        except BaseException:
            lock.close()
            raise
        with self._mutex:
            self._building[staging] = lock
        return staging

    def publish(self, staging: Path, key: CacheKey) -> Path:
        """Make the staging folder the artefact of `key`, in use from now on, and return its path.

        On an error (disk full) the staging folder is removed and nothing becomes visible.
        """
        target = self._entry(key.digest)
        try:
            with cache_errors(staging):
                write_manifest(staging, key.digest, key.about())
                sync_tree(staging)
                use = self._lock(key.digest, "use")
                use.take(shared=True)
                if os.path.lexists(target):
                    self._discard(target)
                os.rename(staging, target)
                sync(target.parent)
                use.touch()
        finally:
            self.abandon(staging)
        self._hold(key.digest, use)
        self.enforce_limit()
        return target

    def abandon(self, staging: Path) -> None:
        """Remove a staging folder that will not be published. Calling it again does nothing."""
        remove_tree(staging)
        with self._mutex:
            lock = self._building.pop(staging, None)
        if lock is not None:
            owner = staging.name.partition(".")[0]
            if owner.startswith("scratch-"):  # nobody else will ever ask for this lock
                (self.root / "locks" / f"{owner}.build").unlink(missing_ok=True)
            lock.close()

    def discard(self, key: CacheKey) -> None:
        """Remove the artefact of `key`, whose weights proved to be damaged."""
        self.release(key)
        with cache_errors(self.root):
            self._discard(self._entry(key.digest))

    def obtain(
        self,
        key: CacheKey,
        build: Callable[[Path], None],
        on_wait: Callable[[], None] | None = None,
        on_miss: Callable[[Miss], None] | None = None,
    ) -> tuple[Path, Miss | None]:
        """Return the artefact of `key`, made by `build(staging)` if need be, and the miss if so.

        `on_miss` is called before the first build, to tell the user why it takes a while.
        """
        first: Miss | None = None
        while True:
            found = self.lookup(key)
            if isinstance(found, Path):
                return found, first
            if first is None and on_miss is not None:
                on_miss(found)
            first = first or found
            staging = self.begin(key, on_wait)
            if staging is None:
                continue
            try:
                build(staging)
                return self.publish(staging, key), first
            finally:
                self.abandon(staging)

    def entries(self) -> list[Entry]:
        """Return all artefacts, the most recently used first."""
        with cache_errors(self.root):
            names = [entry.name for entry in os.scandir(self.root / "entries")]
            found = [self._describe(name) for name in names]
        return sorted(found, key=lambda entry: -entry.last_used)

    def remove(self, key_prefix: str = "") -> tuple[list[Entry], list[Entry]]:
        """Remove the artefacts whose key starts so; return those removed and those in use."""
        chosen = [entry for entry in self.entries() if entry.key.startswith(key_prefix)]
        with cache_errors(self.root):
            self._collect()
            gone = [entry for entry in chosen if self._evict(entry)]
        return gone, [entry for entry in chosen if entry not in gone]

    def enforce_limit(self) -> list[Entry]:
        """Remove the least recently used artefacts, never one in use, until the limit holds.

        The limit is AIOS_CACHE_LIMIT_BYTES. Return what was removed.
        """
        limit = limit_bytes()
        entries = self.entries()
        excess = sum(entry.bytes for entry in entries) - limit
        gone = []
        with cache_errors(self.root):
            for entry in reversed(entries):
                if excess > 0 and self._evict(entry):
                    excess -= entry.bytes
                    gone.append(entry)
        return gone

    def release(self, key: CacheKey) -> None:
        """Say that this object's user no longer uses the artefact of `key`."""
        with self._mutex:
            lock = self._held.pop(key.digest, None)
        if lock is not None:
            lock.close()

    def close(self) -> None:
        """Release everything: artefacts in use and staging folders."""
        for staging in list(self._building):
            self.abandon(staging)
        with self._mutex:
            locks, self._held = list(self._held.values()), {}
        for lock in locks:
            lock.close()

    def _entry(self, digest: str) -> Path:
        return self.root / "entries" / digest

    def _lock(self, digest: str, kind: str) -> FileLock:
        return FileLock(self.root / "locks" / f"{digest}.{kind}")

    def _hold(self, digest: str, lock: FileLock) -> None:
        with self._mutex:
            previous, self._held[digest] = self._held.get(digest), lock
        if previous is not None:
            previous.close()

    def _why(self, key: CacheKey) -> str:
        manifests = []
        for entry in os.scandir(self.root / "entries"):
            with contextlib.suppress(CacheError):
                manifests.append(dict(read_manifest(Path(entry.path)).about))
        return explain_miss(key, manifests)

    def _describe(self, name: str) -> Entry:
        path = self._entry(name)
        lock = self._lock(name, "use")
        try:
            in_use = not lock.take(wait=False)
        finally:
            lock.close()
        source, size = "damaged", 0
        with contextlib.suppress(CacheError, OSError):
            size = sum(info.st_size for info in list_files(path).values())
            manifest: Manifest = read_manifest(path)
            source = str(manifest.about.get("source", ""))
        used = (self.root / "locks" / f"{name}.use").stat().st_mtime
        return Entry(name, path, source, size, used, in_use)

    def _evict(self, entry: Entry) -> bool:
        lock = self._lock(entry.key, "use")
        try:
            if not lock.take(wait=False):
                return False
            trash = self._to_trash(entry.path)
        finally:
            lock.close()
        if trash is not None:
            remove_tree(trash)
        return trash is not None

    def _discard(self, path: Path) -> None:
        """Remove an entry even if it is in use: who has mapped it keeps its pages."""
        trash = self._to_trash(path)
        if trash is not None:
            remove_tree(trash)

    def _to_trash(self, path: Path) -> Path | None:
        trash = self.root / "staging" / f"trash.{secrets.token_hex(8)}"
        try:
            os.rename(path, trash)
        except FileNotFoundError:
            return None
        return trash

    def _collect(self) -> None:
        """Remove trash, and the staging folders of processes that are gone."""
        for entry in list(os.scandir(self.root / "staging")):
            owner = entry.name.partition(".")[0]
            if owner == "trash":
                remove_tree(Path(entry.path))
                continue
            lock = self._lock(owner, "build")
            try:
                if lock.take(wait=False):
                    remove_tree(Path(entry.path))
            finally:
                lock.close()


def limit_bytes() -> int:
    """Return AIOS_CACHE_LIMIT_BYTES; ConfigError if it is no size."""
    return env.CACHE_LIMIT.get_int(0, _MAX_LIMIT_BYTES)


def make_private_parent(root: Path) -> Path:
    """Create the folder that holds the store; what exists keeps its mode."""
    with cache_errors(root):
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root
