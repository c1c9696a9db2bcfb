"""Files mapped into memory, never copied, and never read past their checked end."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aios_compile.errors import CheckpointError


class MappedFiles:
    """Maps a file when bytes of it are first asked for."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def bytes_of(self, path: Path, begin: int, end: int) -> NDArray[np.uint8]:
        """Return the bytes [begin, end) as a read-only view. Raises CheckpointError."""
        if begin == end:
            return np.empty(0, np.uint8)
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped = self._maps[path]
        if len(mapped) < end:
            raise CheckpointError(
                f"{path}: truncated since it was opened: {len(mapped)} bytes, expected {end}"
            )
        return np.frombuffer(mapped, np.uint8, end - begin, begin)

    def close(self) -> None:
        """Unmap. Arrays that are still in use keep theirs."""
        for mapped in self._maps.values():
            try:
                mapped.close()
            except BufferError:
                continue  # a view is alive: the map goes with it
        self._maps.clear()
