"""Folders and files of one user: checked, locked, and written so that a crash leaves no half file.

A folder is private when it is a real directory (no link), owned by this user and closed to
everybody else (0700). Locks are flock on empty files that are never removed, so two processes
always lock the same inode; the kernel lets go of them however a process ends, kill -9 included.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from aios_compile.errors import CacheError

_ADVICE = "name another folder with --cache-dir or AIOS_CACHE_DIR"


@contextlib.contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a CacheError that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = f"`aios cache rm` frees space, or {_ADVICE}"
            raise CacheError(f"no space left to write {where}", advice=advice) from error
        raise CacheError(f"cannot use the cache at {where}: {reason}", advice=_ADVICE) from error


def make_private(path: Path) -> Path:
    """Create `path` as a private folder or check that it is one; raise CacheError if it is not.

    A folder of this user that others may read is closed; one that others may write is refused, as
    they may have written to it already.
    """
    with cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        _check_parent(path.parent)
        info = os.lstat(path)
        if not stat.S_ISDIR(info.st_mode):
            raise CacheError(f"the cache {path} is a link or no folder", advice=_ADVICE)
        if info.st_uid != os.geteuid():
            who = f"belongs to user {info.st_uid}, expected {os.geteuid()}"
            raise CacheError(f"the cache {path} {who}", advice=_ADVICE)
        if info.st_mode & 0o022:
            mode = f"{stat.S_IMODE(info.st_mode):04o}"
            advice = f"remove it and let it be made again, or {_ADVICE}"
            raise CacheError(f"the cache {path} can be written by others ({mode})", advice=advice)
        if info.st_mode & 0o077:
            os.chmod(path, 0o700)
        if not os.access(path, os.W_OK | os.X_OK):
            raise CacheError(f"the cache {path} is read-only", advice=_ADVICE)
    return path


def _check_parent(parent: Path) -> None:
    """Refuse a parent in which another user could exchange our folder for theirs."""
    info = os.stat(parent)
    if info.st_uid not in (0, os.geteuid()):
        raise CacheError(f"the folder {parent} belongs to user {info.st_uid}", advice=_ADVICE)
    if info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX:
        advice = f"chmod go-w {parent}, or {_ADVICE}"
        raise CacheError(f"the folder {parent} can be written by others", advice=advice)


class FileLock:
    """One flock on `path`. Locks of two objects exclude each other, in one process too."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def take(self, *, shared: bool = False, wait: bool = True) -> bool:
        """Take the lock, or return False if `wait` is off and another holds it."""
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(self._fd, mode)
        except BlockingIOError:
            return False
        return True

    def touch(self) -> None:
        """Set the lock's modification time to now: when its entry was last used."""
        os.utime(self._fd)

    def close(self) -> None:
        """Let go of the lock. Calling it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_atomically(path: Path, data: bytes) -> None:
    """Write the file so that a reader sees the old or the new content, whatever happens."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def sync_tree(folder: Path) -> None:
    """Make all files of `folder` read-only and force files and folders to the disk."""
    for here, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(os.path.join(here, name), read_only=True)
        sync(here)


# Packed weights are not forced to the disk: that takes seconds a gigabyte, and every start verifies
# them, so that what a power failure tore is compiled again.
_LARGE_BYTES = 64 << 20


def sync(path: str | Path, *, read_only: bool = False) -> None:
    """Force a file or folder to the disk; with `read_only` take everybody's right to write it.

    Files of more than 64 MiB are left to the system.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if read_only:
            os.fchmod(fd, 0o400)
        if os.fstat(fd).st_size <= _LARGE_BYTES:
            os.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove a folder (never what a link points to); another process may be doing the same."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
