"""A file mapped read-only from an address that is a multiple of a huge page on.

Where the page cache holds a file in huge pages (Linux: ext4 from 6.16 on, XFS from 5.18 on), such a
mapping gets them without a copy; elsewhere, runtime/huge_pages.py can put huge pages in the place
of small ones. Both need the file's address and its offsets to agree modulo HUGE_PAGE, which plain
mmap promises on some file systems only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

HUGE_PAGE = 2 << 20  # of x86-64, and of aarch64 with small pages of 4 KiB
MAP_FIXED = 0x10  # Python's mmap does not know it; the same on all that Linux and torch run on


def map_aligned(path: Path) -> tuple[mmap.mmap, int]:
    """Return a mapping and where the file begins in it; its bytes are shared and read-only.

    The mapping goes on to the end of the file's last huge page. Closing it unmaps all. OSError if
    the file cannot be mapped. Elsewhere than on Linux the file is mapped where the system likes.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if sys.platform != "linux":
            flags, protection = mmap.MAP_SHARED, mmap.PROT_READ
            return mmap.mmap(file.fileno(), size, flags=flags, prot=protection), 0
        whole = -(-size // HUGE_PAGE) * HUGE_PAGE
        # Addresses only: nobody can write to private memory that is read-only, so none is reserved.
        flags, protection = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ
        mapped = mmap.mmap(-1, whole + HUGE_PAGE, flags=flags, prot=protection)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        begin = -address % HUGE_PAGE
        _map_over(address + begin, size, file.fileno())
    with suppress(OSError):  # a kernel without huge pages
        # What is not in the page cache yet is read into huge pages where the file system has them,
        # and in steps of 2 MiB anyway; MADV_WILLNEED would read it into small pages.
        mapped.madvise(mmap.MADV_HUGEPAGE, begin, size)
    return mapped, begin


def _map_over(address: int, num_bytes: int, fd: int) -> None:
    flags = mmap.MAP_SHARED | MAP_FIXED
    if memory_calls().mmap(address, num_bytes, mmap.PROT_READ, flags, fd, 0) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@cache
def memory_calls() -> ctypes.CDLL:
    """Return the C library with the types of what it knows about memory: mmap and its kin."""
    libc, address, size = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.restype = address
    libc.mmap.argtypes = [address, size, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = libc.mprotect.argtypes = [address, size, ctypes.c_int]
    libc.munmap.argtypes = [address, size]
    if sys.platform == "linux":
        libc.mremap.restype = address
        libc.mremap.argtypes = [address, size, size, ctypes.c_int, address]
    return libc
