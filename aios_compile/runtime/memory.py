"""Anonymous memory from the operating system: the arena and the KV pool.

Owner: whoever made the Region; `close` unmaps it, after which its arrays must not be touched.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.codegen.aligned_map import HUGE_PAGE

PAGE = mmap.PAGESIZE
POISON = 0xFF  # every float of poisoned bytes is a NaN, every index is -1


class Region:
    """`num_bytes` of zeroed private memory, page-aligned at its begin.

    guarded: the memory ends exactly at a page that may not be touched (and begins after one), so
    that an access past the plan dies at once; used in tests. huge: asks for huge pages
    everywhere; else only where `ask_for_huge_pages` says so.
    """

    def __init__(self, num_bytes: int, *, guarded: bool = False, huge: bool = True) -> None:
        self.num_bytes = num_bytes
        self._guarded = guarded
        self.closed = False
        whole = -(-max(num_bytes, 1) // PAGE) * PAGE
        guard = PAGE if guarded else 0
        self._map = mmap.mmap(-1, whole + 2 * guard, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._anchor: Any = ctypes.c_char.from_buffer(self._map)
        base = ctypes.addressof(self._anchor)
        # Under guard the last byte of the plan touches the guard page; alignment is kept at 64.
        self._skip = guard + ((whole - num_bytes) // 64 * 64 if guarded else 0)
        self.address = base + self._skip
        if guarded:
            _protect(base, PAGE)
            _protect(base + guard + whole, PAGE)
        elif huge:
            self.ask_for_huge_pages(0, num_bytes)
        elif hasattr(mmap, "MADV_NOHUGEPAGE"):
            with suppress(OSError):  # a kernel without any
                self._map.madvise(mmap.MADV_NOHUGEPAGE)

    def array(self) -> NDArray[np.uint8]:
        """Return the bytes as an array (valid until close)."""
        raw = (ctypes.c_uint8 * self.num_bytes).from_address(self.address)
        return np.ctypeslib.as_array(raw)

    def ask_for_huge_pages(self, begin: int, end: int) -> None:
        """Ask for huge pages wherever one fits from offset begin up to end; not under guard.

        They are asked for, not needed: a system may have none. A touched byte takes 2 MiB then.
        """
        base = self.address - self._skip
        first = -(-(self.address + begin) // HUGE_PAGE) * HUGE_PAGE - base
        last = (self.address + end) // HUGE_PAGE * HUGE_PAGE - base
        if first < last and not self._guarded and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE, first, last - first)

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
