"""Packed weight layouts. Torch-free: the loader and the cached start need numpy only.

rows16: [ceil(N / 16)][K][16], the rows of w[N, K] in blocks of 16, element k of the 16 rows side by
side, so that one vector load feeds 16 rows and a block is one sequential stream. Rows beyond N are
zeros. bfloat16 travels as its bits in uint16.

pairs16: [ceil(N / 16)][ceil(K / 2)][16][2], bfloat16 only: as rows16, with elements 2 j and 2 j + 1
of a row side by side, which is what dot products of pairs take. An odd K is filled with zeros.

quant16.<format>: [ceil(N / 16)][row_bytes * 16], the rows uint8[N, row_bytes] of a quantised matrix
(ir/quant_format.py) in blocks of 16. Each field of a super-block is interleaved in its own pieces:
four bytes of codes (four k of a row: a lane of a dot product), a scale, a minimum. Codes and scales
stay one sequential stream. Where a group of 16 rows fills no whole cache lines (32 codes of 8 bits
and a scale take 8.5), groups lie together by two or four (`joint_groups`): their codes, then their
scales, then their minimums, so that no load of codes touches two lines.

<layout>_halves (quant16_halves.<format>): of a matrix whose halves are combined row by row (a
gate's rows, then those of what it gates), the blocks lie by turns: block i of the first half, then
block i of the second. Both are computed together, so what one token reads is one stream.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_compile.errors import CheckpointError
from aios_compile.ir.quant_format import Field, QuantFormat

Array = NDArray[Any]
ROWS = 16
LINE_BYTES = 64
HALVES = "_halves"
FLOAT_LAYOUTS = ("rows16", "pairs16")  # of whole float matrices
CHUNK_ELEMENTS = 1 << 18  # a chunk, its mask and its packed copy stay in the L2 cache


def pack(w: Array, layout: str, label: str = "weight") -> Array:
    """Return a matrix in the layout of that name: w[N, K] of rows16 and pairs16, quantised rows of
    quant16. See the functions below.
    """
    kind, halves = kind_of(layout), has_halves(layout)
    if kind == "quant16":
        return pack_quant16(w, QuantFormat.parse(layout.partition(".")[2]), label, halves)
    return {"rows16": pack_rows16, "pairs16": pack_pairs16}[kind](w, label, halves)


def kind_of(layout: str) -> str:
    """Return a layout's name without its format and whatever its blocks' order is."""
    return layout.partition(".")[0].removesuffix(HALVES)


def has_halves(layout: str) -> bool:
    """Return whether the blocks of both halves lie by turns."""
    return layout.partition(".")[0].endswith(HALVES)


def with_halves(layout: str) -> str:
    """Return the name of the layout with the blocks of both halves by turns."""
    kind, dot, form = layout.partition(".")
    return kind + HALVES + dot + form


def pack_rows16(w: Array, label: str = "weight", halves: bool = False) -> Array:
    """Return w[N, K] (float32, float16, bfloat16 bits in uint16) as rows16 [ceil(N / 16), K, 16].

    `label` names the tensor in errors. halves: the blocks of both halves by turns; N is a multiple
    of 32. Raises CheckpointError when a value is NaN or infinite. Memory: the result and less than
    2 MiB.
    """
    assert w.ndim == 2, f"{label}: rows16 packs matrices, got shape {w.shape}"
    packed = np.empty((-(-len(w) // ROWS), w.shape[1], ROWS), w.dtype)
    for first_row, part, into in _parts(w, packed, halves):
        _fill_rows16(part, into, label, first_row)
    return packed


def _parts(w: Array, packed: Array, halves: bool) -> list[tuple[int, Array, Array]]:
    """Return (first row, rows, the blocks that they fill) of the whole matrix, or of its halves."""
    if not halves:
        return [(0, w, packed)]
    assert len(w) % (2 * ROWS) == 0, f"halves of {len(w)} rows are no whole blocks"
    middle = len(w) // 2
    return [(0, w[:middle], packed[0::2]), (middle, w[middle:], packed[1::2])]


def _fill_rows16(w: Array, packed: Array, label: str, first_row: int) -> None:
    rows, depth = w.shape
    full = rows // ROWS
    wide = w[: full * ROWS].reshape(full, ROWS, depth)
    step = max(1, CHUNK_ELEMENTS // max(1, ROWS * depth))
    for first in range(0, full, step):
        chunk = wide[first : first + step]
        _check_chunk(chunk, label, first_row + first * ROWS)
        packed[first : first + len(chunk)] = chunk.transpose(0, 2, 1)
    if full < len(packed):
        rest = w[full * ROWS :]
        _check_chunk(rest, label, first_row + full * ROWS)
        packed[full] = 0
        packed[full, :, : rows - full * ROWS] = rest.T


def pack_pairs16(w: Array, label: str = "weight", halves: bool = False) -> Array:
    """Return w[N, K] (bfloat16 bits in uint16) as pairs16 [ceil(N / 16), ceil(K / 2), 16, 2].

    Raises CheckpointError when a value is NaN or infinite. Memory: as pack_rows16, and a copy of w
    when K is odd.
    """
    assert w.dtype == np.uint16, f"{label}: pairs16 packs bfloat16 bits, got {w.dtype}"
    if w.shape[1] % 2:
        w = np.pad(w, ((0, 0), (0, 1)))
    packed = pack_rows16(np.ascontiguousarray(w).view(np.uint32), label, halves)
    return packed.view(np.uint16).reshape(*packed.shape, 2)


def unpack_pairs16(packed: Array, rows: int, depth: int) -> Array:
    """Return the matrix [rows, depth] of a pairs16 array."""
    wide = unpack_rows16(packed.reshape(*packed.shape[:2], -1).view(np.uint32), rows)
    return np.ascontiguousarray(wide.view(np.uint16)[:, :depth])


def unpack_rows16(packed: Array, rows: int) -> Array:
    """Return the matrix [rows, K] of a rows16 array."""
    blocks, depth, width = packed.shape
    assert width == ROWS and 0 <= blocks * ROWS - rows < ROWS, f"{packed.shape} is not {rows} rows"
    return np.ascontiguousarray(packed.transpose(0, 2, 1).reshape(blocks * ROWS, depth)[:rows])


def in_order(packed: Array) -> Array:
    """Return the blocks of a matrix that was packed with halves, those of the first half first."""
    return np.concatenate([packed[0::2], packed[1::2]])


def joint_groups(form: QuantFormat, depth: int) -> int:
    """Return how many neighbouring groups lie together in a block of a matrix of that depth.

    The fewest that fill whole cache lines. Super-blocks stay as they are.
    """
    if form.span != form.group:
        return 1
    groups, num_bytes = depth // form.group, form.group_bytes * ROWS
    fitting = (n for n in (1, 2, 4) if groups % n == 0 and n * num_bytes % LINE_BYTES == 0)
    return next(fitting, 1)


def pack_quant16(
    rows: Array, form: QuantFormat, label: str = "weight", halves: bool = False
) -> Array:
    """Return quantised rows uint8[N, row_bytes] as [ceil(N / 16), row_bytes * 16].

    halves: the blocks of both halves by turns; N is a multiple of 32. Raises CheckpointError when a
    scale or a minimum is NaN or infinite: a weight was, or is too large for the format. Memory: the
    result and less than 2 MiB.
    """
    count, row_bytes = rows.shape
    joint = joint_groups(form, form.depth(row_bytes))
    sets, set_bytes = row_bytes // form.span_bytes // joint, joint * form.span_bytes
    packed = np.empty((-(-count // ROWS), sets, set_bytes * ROWS), np.uint8)
    for first_row, part, into in _parts(rows, packed, halves):
        _fill_quant16(part, into, form, label, first_row)
    return packed.reshape(len(packed), -1)


def _fill_quant16(
    rows: Array, packed: Array, form: QuantFormat, label: str, first_row: int
) -> None:
    blocks, sets, set_bytes = packed.shape
    joint = set_bytes // (form.span_bytes * ROWS)
    step = max(1, CHUNK_ELEMENTS // (ROWS * rows.shape[1]))
    for first in range(0, blocks, step):
        chunk = rows[first * ROWS : (first + step) * ROWS]
        _check_scales(chunk, form, label, first_row + first * ROWS)
        if len(chunk) % ROWS:
            chunk = np.pad(chunk, ((0, -len(chunk) % ROWS), (0, 0)))
        spans = chunk.reshape(-1, ROWS, sets, joint, form.span_bytes).transpose(0, 2, 3, 1, 4)
        for field, inside in _places(form, joint):
            part = spans[..., field.begin : field.end]
            pieces = part.reshape(*part.shape[:-1], -1, field.unit).swapaxes(3, 4)
            into = packed[first : first + step, :, inside]
            into[...] = pieces.reshape(into.shape)


def _places(form: QuantFormat, joint: int) -> list[tuple[Field, slice]]:
    """Return where each field of `joint` super-blocks of 16 rows lies, one after the other."""
    size = joint * ROWS
    return [(field, slice(field.begin * size, field.end * size)) for field in form.fields()]


def unpack_quant16(packed: Array, form: QuantFormat, count: int) -> Array:
    """Return the rows uint8[count, row_bytes] of a quant16 array."""
    row_bytes = packed.shape[1] // ROWS
    joint = joint_groups(form, form.depth(row_bytes))
    sets = packed.reshape(len(packed), -1, joint * form.span_bytes * ROWS)
    rows = np.empty((len(packed), ROWS, sets.shape[1], joint, form.span_bytes), np.uint8)
    for field, inside in _places(form, joint):
        part = sets[..., inside].reshape(*sets.shape[:2], joint, -1, ROWS, field.unit)
        pieces = part.transpose(0, 4, 1, 2, 3, 5)
        rows[..., field.begin : field.end] = pieces.reshape(*pieces.shape[:4], -1)
    return rows.reshape(len(packed) * ROWS, -1)[:count]


def _check_scales(rows: Array, form: QuantFormat, label: str, first_row: int) -> None:
    """Raise CheckpointError for the first scale or minimum that is NaN or infinite."""
    kinds = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}
    spans = rows.reshape(len(rows), -1, form.span_bytes)
    for field in form.fields():
        if field.dtype in kinds:
            data = np.ascontiguousarray(spans[..., field.begin : field.end])
            values = data.view(kinds[field.dtype]).reshape(len(rows), -1)
            _check_chunk(values, f"scales of {label}", first_row)


def check_finite(array: Array, label: str) -> None:
    """Raise CheckpointError when a float32, float16 or bfloat16-bits array holds NaN or infinity.

    Integer arrays other than uint16 pass.
    """
    if array.dtype.kind == "f" or array.dtype == np.uint16:
        flat = array.reshape(-1)
        for first in range(0, flat.size, CHUNK_ELEMENTS):
            _check_chunk(flat[first : first + CHUNK_ELEMENTS], label, None)


def _check_chunk(chunk: Array, label: str, first_row: int | None) -> None:
    if chunk.dtype == np.uint32:  # pairs of bfloat16
        chunk = np.ascontiguousarray(chunk).view(np.uint16)
    if chunk.dtype == np.uint16:
        bad = (chunk & np.uint16(0x7F80)) == np.uint16(0x7F80)
    else:
        bad = ~np.isfinite(chunk)
    if not bad.any():
        return
    where = ""
    if first_row is not None:
        matrix = bad.reshape(-1, chunk.shape[-1])
        row, column = (int(i) for i in np.argwhere(matrix)[0])
        where = f", first at [{first_row + row}, {column}]"
    raise CheckpointError(
        f"{label}: {int(bad.sum())} or more values are NaN or infinite{where}",
        advice="download the checkpoint again; training that diverged leaves such weights too",
    )
