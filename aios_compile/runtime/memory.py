"""Anonymous memory from the operating system: the arena and the KV pool.

Owner: whoever made the Region; `close` unmaps it, after which its arrays must not be touched.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
POISON = 0xFF  # every float of poisoned bytes is a NaN, every index is -1


class Region:
    """`num_bytes` of zeroed private memory, page-aligned at its begin.

    guarded: the memory ends exactly at a page that may not be touched (and begins after one), so
    that an access past the plan dies at once; used in tests. Huge pages are asked for, not needed.
    """

    def __init__(self, num_bytes: int, *, guarded: bool = False) -> None:
        self.num_bytes = num_bytes
        self.closed = False
        whole = -(-max(num_bytes, 1) // PAGE) * PAGE
        guard = PAGE if guarded else 0
        self._map = mmap.mmap(-1, whole + 2 * guard, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if not guarded and hasattr(mmap, "MADV_HUGEPAGE") and whole >= 2 << 20:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._anchor: Any = ctypes.c_char.from_buffer(self._map)
        base = ctypes.addressof(self._anchor)
        # Under guard the last byte of the plan touches the guard page; alignment is kept at 64.
        self._skip = guard + ((whole - num_bytes) // 64 * 64 if guarded else 0)
        self.address = base + self._skip
        if guarded:
            _protect(base, PAGE)
            _protect(base + guard + whole, PAGE)

    def array(self) -> NDArray[np.uint8]:
        """Return the bytes as an array (valid until close)."""
        raw = (ctypes.c_uint8 * self.num_bytes).from_address(self.address)
        return np.ctypeslib.as_array(raw)

    def poison(self) -> None:
        """Fill the region with bytes that are NaN as floats and -1 as indices."""
        ctypes.memset(self.address, POISON, self.num_bytes)

    def close(self) -> None:
        """Unmap. Idempotent."""
        if self.closed:
            return
        self.closed = True
        del self._anchor
        self._map.close()


def _protect(address: int, num_bytes: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    prot_none = 0
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), prot_none):
        raise OSError(ctypes.get_errno(), "mprotect of a guard page failed")
