"""Huge pages of Linux: who has them, and how small ones are replaced under a running reader.

`replace` copies a range into anonymous huge pages elsewhere and moves these over the range with
mremap. To a reader the bytes are the same before and after, and there is no moment between: page
faults wait for mremap, which moves whole entries of the page table (mm/mremap.c; move_huge_pmd). So
pointers into the range stay what they were, and nobody need know.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import sys
from pathlib import Path

import numpy as np

from aios_compile import env
from aios_compile.codegen.aligned_map import HUGE_PAGE, memory_calls

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PAGEMAP = Path("/proc/self/pagemap")
# Of uapi/linux/mman.h and uapi/linux/fs.h, the same on x86-64 and aarch64.
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_POPULATE_READ, MADV_COLLAPSE = 22, 25
PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), Linux 6.7
PAGE_IS_PRESENT, PAGE_IS_HUGE = 1 << 3, 1 << 6
FAILED = ctypes.c_void_p(-1).value
REGIONS = 512  # found by one call; the next goes on behind them
Range = tuple[int, int]  # addresses, from and up to


def allowed() -> bool:
    """Return whether the system gives huge pages to who asks, and the user does not mind."""
    if not env.HUGE_WEIGHTS.get_int(0, 1) or sys.platform != "linux":
        return False
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in ENABLED.read_text()
    except OSError:
        return False


def populate(begin: int, end: int) -> None:
    """Map the pages from begin up to end that are not mapped yet, if the kernel knows how to."""
    memory_calls().madvise(begin, end - begin, MADV_POPULATE_READ)


def find(begin: int, end: int) -> list[Range] | None:
    """Return what lies in huge pages from begin up to end, both multiples of HUGE_PAGE, in order.

    None: this kernel does not say (before 6.7).
    """
    found: list[Range] = []
    regions = np.zeros((REGIONS, 3), np.uint64)  # start, end, categories
    mask = PAGE_IS_PRESENT | PAGE_IS_HUGE
    try:
        with open(PAGEMAP, "rb", buffering=0) as file:
            while begin < end:
                # size flags start end walk_end vec vec_len max_pages inverted mask anyof return
                args = np.array(
                    [96, 0, begin, end, 0, regions.ctypes.data, REGIONS, 0, 0, mask, 0, mask],
                    np.uint64,
                )
                count = fcntl.ioctl(file, PAGEMAP_SCAN, args.data, True)
                found += [(int(start), int(stop)) for start, stop, _ in regions[:count]]
                begin = int(args[4])
    except OSError:
        return None
    return found


def replace(begin: int, end: int) -> bool:
    """Put huge pages with the same bytes in the place of the pages from begin up to end.

    begin, end: multiples of HUGE_PAGE, inside one mapping that nobody writes or unmaps meanwhile;
    it is read-only afterwards. Returns False, and changes nothing, where no huge pages are to be
    had. The copy needs end - begin bytes of memory; the old pages are given back.
    """
    size, libc = end - begin, memory_calls()
    copy = _aligned(size)
    if copy is None:
        return False
    moved = False
    try:
        if libc.madvise(copy, size, mmap.MADV_HUGEPAGE):
            return False
        ctypes.memmove(copy, begin, size)  # without the GIL, like each call here
        # Asks once more for huge pages where the first touch got small ones. EINVAL: before Linux
        # 6.1 nobody says what was got.
        if libc.madvise(copy, size, MADV_COLLAPSE) and ctypes.get_errno() != errno.EINVAL:
            return False
        if libc.mprotect(copy, size, mmap.PROT_READ):
            return False
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        moved = bool(libc.mremap(copy, size, size, flags, begin) == begin)
        return moved
    finally:
        if not moved:  # else its addresses may be somebody else's by now
            libc.munmap(copy, size)


def _aligned(size: int) -> int | None:
    """Return the address of so many bytes of new memory, at a multiple of HUGE_PAGE."""
    libc, flags = memory_calls(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    raw = libc.mmap(None, size + HUGE_PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if raw == FAILED:
        return None
    before = -raw % HUGE_PAGE
    if before:
        libc.munmap(raw, before)
    libc.munmap(raw + before + size, HUGE_PAGE - before)
    return int(raw + before)
