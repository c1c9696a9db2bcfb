"""The artefact folder: what is written is read back, and any change of any byte is found."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from aios_compile.codegen.aligned_map import HUGE_PAGE
from aios_compile.codegen.artefact import Artefact, ArtefactWriter, verify_weights
from aios_compile.codegen.checksum import BLOCK_BYTES, Checksum, checksum_buffer, checksum_file
from aios_compile.codegen.manifest import canonical, verify_folder, write_manifest
from aios_compile.errors import CacheError


def write_artefact(folder: Path, num_tensors: int = 3) -> None:
    """Fill `folder` with a small artefact, without its manifest."""
    writer = ArtefactWriter(folder)
    for index in range(num_tensors):
        writer.add_tensor(f"w{index}", np.arange(5 + index, dtype=np.float32) + index)
    writer.add_tensor("bits", np.arange(6, dtype=np.uint16).reshape(2, 3), dtype="bfloat16")
    writer.add_tensor("empty", np.zeros((0, 4), np.float32))
    writer.write_json("program.json", {"launches": []})
    writer.write_json("plan.json", {"arena_bytes": 64})
    writer.write_text("kernels/rms_norm.cpp", "// one kernel\n")
    writer.write_bytes("lib.so", bytes(range(256)))
    writer.write_bytes("tokenizer/tokenizer.json", b"{}")
    writer.finish()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "artefact"
    path.mkdir()
    write_artefact(path)
    write_manifest(path, "k" * 64, {"source": "m", "parts": {}})
    return path


def test_what_is_written_is_read_back(folder: Path) -> None:
    artefact = Artefact.open(folder)
    np.testing.assert_array_equal(artefact.tensor("w2"), np.arange(7, dtype=np.float32) + 2)
    assert artefact.tensor("bits").dtype == np.uint16 and artefact.tensor("bits").shape == (2, 3)
    assert artefact.tensor("empty").shape == (0, 4)
    assert not artefact.tensor("w0").flags.writeable
    assert all(record.offset % 64 == 0 for record in artefact.tensors.values())
    assert artefact.program == {"launches": []} and artefact.plan == {"arena_bytes": 64}
    assert artefact.library.read_bytes() == bytes(range(256))
    artefact.verify_weights(num_threads=1)
    artefact.close()


def test_weights_are_written_in_whole_huge_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the page cache uses small ones at ends of tensors. Calls may write less than asked."""
    real, ends, at = os.writev, [], 0

    def short(fd: int, pieces: list[memoryview]) -> int:
        nonlocal at
        ends.append(at + sum(map(len, pieces)))
        whole = b"".join(pieces)
        count = real(fd, [whole[: rng.integers(1, 2 << 20)]])
        at += count
        return count

    monkeypatch.setattr(os, "writev", short)
    rng = np.random.default_rng(0)
    writer, arrays = ArtefactWriter(tmp_path), []
    for index, size in enumerate([5, HUGE_PAGE - 64, 64, 1, 3 * HUGE_PAGE + 7, HUGE_PAGE, 0, 9]):
        arrays.append(rng.integers(0, 255, size, np.uint8))
        writer.add_tensor(f"w{index}", arrays[-1])
    writer.finish()
    assert len(ends) > 5 and all(end % HUGE_PAGE == 0 or end == ends[-1] for end in ends)
    artefact = Artefact.unsealed(tmp_path)
    for index, array in enumerate(arrays):
        np.testing.assert_array_equal(artefact.tensor(f"w{index}"), array)
    assert len(artefact.weights) == ends[-1] == (tmp_path / "weights.bin").stat().st_size
    artefact.close()


def test_any_byte_of_any_file_is_found(folder: Path) -> None:
    """Flip every byte of every file once, cut and extend each: never loaded."""
    verify_folder(folder, "k" * 64)
    verify_weights(folder)
    tried = 0
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        good = path.read_bytes()
        bad = [good[:i] + bytes([good[i] ^ 0x20]) + good[i + 1 :] for i in range(len(good))]
        for content in [*bad, good[:-1], good + b"\0"]:
            path.write_bytes(content)
            with pytest.raises(CacheError):
                verify_folder(folder, "k" * 64)
                verify_weights(folder)
            tried += 1
        path.write_bytes(good)
    assert tried > 1500
    verify_folder(folder, "k" * 64)
    verify_weights(folder)


def test_missing_extra_and_linked_files_are_found(folder: Path) -> None:
    extra = folder / "kernels" / "extra.cpp"
    extra.write_text("")
    with pytest.raises(CacheError, match="not in the manifest"):
        verify_folder(folder, "k" * 64)
    extra.unlink()
    library = folder / "lib.so"
    elsewhere = folder.parent / "lib.so"
    library.rename(elsewhere)
    with pytest.raises(CacheError, match=r"lib\.so: is missing"):
        verify_folder(folder, "k" * 64)
    library.symlink_to(elsewhere)
    with pytest.raises(CacheError, match="is a link"):
        verify_folder(folder, "k" * 64)
    library.unlink()
    with pytest.raises(CacheError, match=r"lib\.so: is missing"):
        Artefact.open(folder).close()


def test_an_entry_under_another_key_is_refused(folder: Path) -> None:
    with pytest.raises(CacheError, match="has key"):
        verify_folder(folder, "j" * 64)


@pytest.mark.parametrize(
    "tensors",
    [
        [["a", "float32", [4], 8]],
        [["a", "float32", [4], 0], ["b", "float32", [4], 0]],
        [["a", "float32", [400], 0]],
        [["a", "float99", [4], 0]],
        [["a", "float32", [-4], 0]],
        [["a", "float32", [2], 0], ["a", "float32", [2], 64]],
        "nonsense",
    ],
)
def test_a_bad_table_of_tensors_is_refused(folder: Path, tensors: object) -> None:
    size = (folder / "weights.bin").stat().st_size
    table = {"bytes": size, "checksum": "0" * 16, "tensors": tensors}
    (folder / "weights.json").write_bytes(canonical(table))
    write_manifest(folder, "k" * 64, {})
    with pytest.raises(CacheError, match=r"weights\.json"):
        Artefact.open(folder)


def test_an_older_format_is_refused_by_number(folder: Path) -> None:
    from hashlib import sha256

    body = {"format": 0}
    digest = sha256(canonical(body)).hexdigest()
    (folder / "manifest.json").write_bytes(canonical({**body, "sha256": digest}))
    with pytest.raises(CacheError, match="format 0, expected 1"):
        Artefact.open(folder)


def test_the_writer_refuses_paths_that_leave_the_folder(tmp_path: Path) -> None:
    writer = ArtefactWriter(tmp_path)
    for name in ("../x", "/x", ""):
        with pytest.raises(AssertionError, match="bad name"):
            writer.write_text(name, "")
    writer.close()


@pytest.mark.parametrize("size", [0, 1, 7, 64, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5])
def test_the_checksum_does_not_depend_on_pieces_or_threads(size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    whole = checksum_buffer(memoryview(data), 1)
    stream = Checksum()
    for start in range(0, size, 100_003):
        stream.update(memoryview(data)[start : start + 100_003])
    (tmp_path / "file").write_bytes(data)
    assert stream.hex() == whole == checksum_file(tmp_path / "file", 3)


def test_the_checksum_sees_places_as_well_as_values() -> None:
    """Bits, words, pages and blocks that change or trade places."""
    data = np.random.default_rng(0).integers(0, 256, 3 * BLOCK_BYTES, dtype=np.uint8)
    good = checksum_buffer(memoryview(data), 1)
    rng = np.random.default_rng(1)
    for _ in range(200):
        place, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[place] ^= 1 << bit
        assert checksum_buffer(memoryview(data), 1) != good, (place, bit)
        data[place] ^= 1 << bit
    for unit in (1, 8, 2048, 4096, BLOCK_BYTES):
        moved = data.copy()
        moved[:unit], moved[unit : 2 * unit] = data[unit : 2 * unit], data[:unit]
        assert checksum_buffer(memoryview(moved), 1) != good, unit
    zeros = np.zeros(BLOCK_BYTES, np.uint8)
    assert checksum_buffer(memoryview(zeros), 1) != checksum_buffer(memoryview(zeros[:-8]), 1)
