"""A fast 64-bit checksum of large files, in numpy: finds damage, does not stop a forger.

A block of 256 KiB is a matrix of 128 x 256 little-endian words. Its value is
`sum_c odd_c * column_sum_c + sum_r even_r * row_sum_r` modulo 2^64, the file's is
`sum_b odd_b * value_b + odd * bytes`. A change inside one word changes the value for certain (an
odd factor is invertible modulo 2^64); moved words, rows, pages and blocks change it because each
place has its own factor. Both sums are numpy reductions that run in a cache: 13 GB/s with one
thread and 19 with two over a mapping of 1.2 GB in the page cache (shared Zen 4 cores; sha256: 1.8).
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROWS, COLUMNS = 128, 256
BLOCK_BYTES = ROWS * COLUMNS * 8
GROUP = 8  # blocks a call: they stay in a cache for the second sum, and threads rarely want the GIL
_MASK = (1 << 64) - 1

Words = npt.NDArray[np.uint64]


def _splitmix(first: int, count: int) -> Words:
    """Return `count` words of splitmix64 (Steele, Lea and Flood 2014) from state `first`."""
    z = np.arange(first + 1, first + 1 + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


_ONE = np.uint64(1)
_COLUMN_FACTORS = _splitmix(1 << 40, COLUMNS) | _ONE
_ROW_FACTORS = _splitmix(2 << 40, ROWS) & ~_ONE
_LENGTH_FACTOR = int(_splitmix(3 << 40, 1)[0]) | 1


def _blocks(words: Words, first_block: int) -> int:
    """Return the sum over whole blocks; `words` is [n * ROWS * COLUMNS], n >= 0."""
    matrix = words.reshape(-1, ROWS, COLUMNS)
    factors = _splitmix(first_block, len(matrix)) | _ONE
    columns = np.empty((len(matrix), COLUMNS), np.uint64)
    rows = np.empty((len(matrix), ROWS), np.uint64)
    for first in range(0, len(matrix), GROUP):
        group = slice(first, first + GROUP)
        np.add.reduce(matrix[group], axis=1, out=columns[group])
        np.add.reduce(matrix[group], axis=2, out=rows[group])
    values = columns @ _COLUMN_FACTORS + rows @ _ROW_FACTORS  # modulo 2^64, as all here
    return int(np.dot(values, factors)) if len(matrix) else 0


class Checksum:
    """The checksum of a stream of bytes, fed in pieces of any size."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._num_blocks = 0
        self._value = 0
        self._num_bytes = 0

    def update(self, data: memoryview) -> None:
        """Add `data` (contiguous bytes)."""
        data = data.cast("B")
        self._num_bytes += len(data)
        if self._pending:
            need = BLOCK_BYTES - len(self._pending)
            self._pending += data[:need]
            data = data[need:]
            if len(self._pending) < BLOCK_BYTES:
                return
            self._add(np.frombuffer(bytes(self._pending), "<u8"))
            self._pending = bytearray()
        whole = len(data) // BLOCK_BYTES * BLOCK_BYTES
        if whole:
            self._add(np.frombuffer(data[:whole], "<u8"))
        self._pending += data[whole:]

    def _add(self, words: Words) -> None:
        self._value = (self._value + _blocks(words, self._num_blocks)) & _MASK
        self._num_blocks += len(words) * 8 // BLOCK_BYTES

    def hex(self) -> str:
        """Return the checksum so far as 16 hexadecimal digits."""
        return _finish(self._value, self._num_blocks, bytes(self._pending), self._num_bytes)


def _finish(value: int, num_blocks: int, tail: bytes, num_bytes: int) -> str:
    if tail:
        words = np.frombuffer(tail.ljust(BLOCK_BYTES, b"\0"), "<u8")
        value += _blocks(words, num_blocks)
    return f"{(value + _LENGTH_FACTOR * num_bytes) & _MASK:016x}"


def checksum_file(path: Path, num_threads: int = 2) -> str:
    """Return the checksum of the file, mapped and read by `num_threads` threads."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return Checksum().hex()
        mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        with mapped, memoryview(mapped) as view:
            return checksum_buffer(view, num_threads)


def checksum_buffer(view: memoryview, num_threads: int = 2) -> str:
    """Return the checksum of contiguous bytes; keeps no reference to them."""
    num_blocks = len(view) // BLOCK_BYTES
    words = np.frombuffer(view, "<u8", num_blocks * BLOCK_BYTES // 8)

    # Pieces of 64 blocks: small enough to balance, large enough that Python's share is nothing.
    def piece(first: int) -> int:
        return _blocks(words[first * ROWS * COLUMNS : (first + 64) * ROWS * COLUMNS], first)

    with ThreadPoolExecutor(num_threads) as pool:
        value = sum(pool.map(piece, range(0, num_blocks, 64)))
    return _finish(value, num_blocks, bytes(view[num_blocks * BLOCK_BYTES :]), len(view))
