"""GGUF headers: every kind of damage is a typed error that names the file, quick and cheap."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from aios_compile.checkpoint.gguf_blocks import GGML_TYPES
from aios_compile.checkpoint.gguf_header import read_gguf_header
from aios_compile.config import CompileOptions
from aios_compile.errors import AiosError, CheckpointError, UnsupportedModelError
from aios_compile.model_source import open_source
from tests import zoo
from tests.formats.gguf_files import close, convert

REFUSED = (CheckpointError, UnsupportedModelError)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def record(name: str, sizes: list[int], kind: int, offset: int) -> bytes:
    head = text(name) + struct.pack("<I", len(sizes))
    return head + struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, offset)


def write(
    path: Path,
    entries: list[bytes],
    records: list[bytes],
    data: bytes = bytes(64),
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:
    """Write a file with any header, honest or not."""
    num_tensors, num_entries = counts or (len(records), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries)
    head += b"".join(entries) + b"".join(records)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -3)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint64("a.u64", 1 << 63)
    writer.add_int64("a.i64", -(1 << 62))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.yes", True)
    writer.add_string("a.text", "Ünï")
    writer.add_array("a.texts", ["x", "", "é"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.bools", [True, False])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(34, dtype=np.uint8).reshape(1, 34), raw_dtype=Kind.Q8_0)
    close(writer)
    header = read_gguf_header(tmp_path / "model.gguf")
    assert {key: value for key, value in header.metadata.items() if not np.ndim(value)} == {
        "general.architecture": "llama", "a.u8": 200, "a.i8": -3, "a.u16": 60000, "a.i16": -30000,
        "a.u64": 1 << 63, "a.i64": -(1 << 62), "a.f32": 0.5, "a.f64": 0.1, "a.yes": True,
        "a.text": "Ünï",
    }  # fmt: skip
    assert header.metadata["a.texts"] == ["x", "", "é"]
    assert header.metadata["a.numbers"].tolist() == [1, -2, 3]
    assert header.metadata["a.bools"].tolist() == [1, 0]
    assert header.tensors["one"].shape == (2, 3) and header.tensors["one"].dtype == "F32"
    assert header.tensors["two"].shape == (1, 32) and header.tensors["two"].dtype == "Q8_0"
    theirs = gguf.GGUFReader(tmp_path / "model.gguf")
    assert [t.data_offset for t in theirs.tensors] == [t.begin for t in header.tensors.values()]


def test_types_have_the_packages_numbers() -> None:
    assert {kind.value: kind.name for kind in Kind}.items() <= GGML_TYPES.items()


FLAG = entry("a", 7, b"\1")
ONE = record("x", [4], 0, 0)
TWO = record("y", [8], 0, 32)
DAMAGE: list[tuple[list[bytes], list[bytes], dict[str, Any], str]] = [
    ([], [ONE], {"version": 1}, "GGUF version 1 is not implemented"),
    ([], [ONE], {"version": 3 << 24}, "big-endian GGUF, version 3"),
    ([], [ONE], {"counts": (1 << 60, 0)}, "tensors, at most"),
    ([], [ONE], {"counts": (1, 1 << 62)}, "metadata entries, at most"),
    ([], [ONE], {"counts": (60, 0)}, "60 tensors"),
    ([FLAG, FLAG], [ONE], {}, "'a' stands twice"),
    ([entry("a", 7, b"\2")], [ONE], {}, "bool with the value 2"),
    ([entry("a", 13, b"")], [ONE], {}, "unknown type 13"),
    ([entry("a", 8, struct.pack("<Q", 1 << 63))], [ONE], {}, "of 9223372036854775808 bytes"),
    ([entry("a", 8, struct.pack("<Q", 1) + b"\xff")], [ONE], {}, "not UTF-8"),
    ([entry("a", 9, struct.pack("<IQ", 4, 1 << 61))], [ONE], {}, "items in metadata 'a'"),
    ([entry("a", 9, struct.pack("<IQ", 8, 1 << 61))], [ONE], {}, "items in metadata 'a'"),
    ([entry("a", 9, struct.pack("<IQ", 9, 1))], [ONE], {}, "array of the type 9"),
    ([entry("general.alignment", 4, struct.pack("<I", 0))], [ONE], {}, "alignment is 0"),
    ([entry("general.alignment", 4, struct.pack("<I", 48))], [ONE], {}, "alignment is 48"),
    ([entry("general.alignment", 8, text("32"))], [ONE], {}, "alignment is '32'"),
    ([], [ONE, ONE], {}, "'x' stands twice"),
    ([], [ONE, record("y", [8], 0, 0)], {}, "'y' overlaps"),
    ([], [ONE, record("y", [8], 0, 64)], {}, "'y' follows a hole"),
    ([], [record("x", [4], 0, 32)], {}, "'x' follows a hole"),
    ([], [ONE, record("y", [9], 0, 32)], {}, "truncated: tensor 'y' ends"),
    ([], [record("x", [1 << 62, 1 << 62], 0, 0)], {}, "truncated: tensor 'x' ends"),
    ([], [record("x", [0], 0, 0)], {}, "has the sizes"),
    ([], [record("x", [1 << 63], 0, 0)], {}, "has the sizes"),
    ([], [record("x", [1] * 5, 0, 0)], {}, "5 dimensions"),
    ([], [record("x", [33], 8, 0)], {}, "no multiple of the 32 weights in a block of Q8_0"),
    ([], [record("x", [], 8, 0)], {}, "no multiple of the 32"),
    ([], [record("x", [4], 99, 0)], {}, "unknown type 99"),
    ([], [record("x" * 65, [4], 0, 0)], {}, "name of 65 bytes"),
    ([], [ONE], {}, "32 bytes after the last tensor"),
]  # fmt: skip


@pytest.mark.parametrize("entries, records, changes, reason", DAMAGE)
def test_damaged_headers(
    entries: list[bytes], records: list[bytes], changes: Any, reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "bad.gguf", entries, records, **changes)
    with pytest.raises(REFUSED, match=reason) as caught:
        read_gguf_header(path)
    assert "bad.gguf" in str(caught.value)


def test_an_honest_header_passes(tmp_path: Path) -> None:
    assert set(read_gguf_header(write(tmp_path / "a.gguf", [FLAG], [ONE, TWO])).tensors) == {
        "x",
        "y",
    }


@pytest.mark.parametrize(
    "name", ["Q2_K", "Q3_K", "IQ4_XS", "IQ2_XXS", "MXFP4", "TQ1_0", "Q4_0_8_8"]
)
def test_types_are_refused_by_name(name: str, tmp_path: Path) -> None:
    number = next(number for number, known in GGML_TYPES.items() if known == name)
    with pytest.raises(UnsupportedModelError, match=rf"type {name}.*\n.*Q4_K_M"):
        read_gguf_header(write(tmp_path / "a.gguf", [], [record("x", [256], number, 0)]))


def test_no_gguf_at_all(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"PK\3\4" + bytes(100)):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.gguf: not a GGUF file"):
            read_gguf_header(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf_header(tmp_path)


def test_header_limit(tmp_path: Path) -> None:
    """A file that is all metadata: refused before it fills the memory."""
    big = entry("a", 9, struct.pack("<IQ", 10, 1 << 20))
    with open(tmp_path / "a.gguf", "wb") as file:  # sparse: takes no space
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 9) + big)
        for i in range(8):
            file.seek(8 << 20, 1)
            file.write(entry(f"b{i}", 9, struct.pack("<IQ", 10, 1 << 20)))
        file.truncate(1 << 31)
    with pytest.raises(CheckpointError, match="header of over 67108864 bytes"):
        read_gguf_header(tmp_path / "a.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole model with a tokenizer; the header takes about 3 KiB."""
    folder = tmp_path_factory.mktemp("small")

    def finish(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "a", "b", "ab", "<0x0A>"])
        writer.add_token_scores([0.0, 0.0, -1.0, -2.0, -3.0, 0.0])
        writer.add_token_types([2, 3, 1, 1, 1, 6])
        writer.add_bos_token_id(1)

    convert(zoo.make("llama_tied", folder), folder / "a.gguf", lambda name: Kind.Q8_0, finish)
    return (folder / "a.gguf").read_bytes()


def open_all(path: Path) -> None:
    """Do all that is done with a header: config, names and shapes, tokenizer."""
    open_source(path, CompileOptions.parse({}))


def hold(path: Path, cases: list[bytes], what: Callable[[Path], None]) -> int:
    """Return how many of the files are refused; nothing but typed errors, quick, in little room."""
    refused = 0
    slowest = 0.0
    tracemalloc.start()
    for case in cases:
        path.write_bytes(case)
        begin = time.process_time()
        try:
            what(path)
        except AiosError:
            refused += 1
        slowest = max(slowest, time.process_time() - begin)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert slowest < 1 and peak < 64 << 20, (slowest, peak)
    return refused


def header_bytes(content: bytes, path: Path) -> int:
    path.write_bytes(content)
    return min(info.begin for info in read_gguf_header(path).tensors.values())


def test_every_truncation(small: bytes, tmp_path: Path) -> None:
    end = header_bytes(small, tmp_path / "a.gguf")
    cases = [small[:n] for n in range(end)] + [small[: len(small) - n] for n in (33, 1000)]
    assert hold(tmp_path / "a.gguf", cases, open_all) == len(cases)


def test_every_byte_flip(small: bytes, tmp_path: Path) -> None:
    end = header_bytes(small, tmp_path / "a.gguf")
    generator = np.random.default_rng(0)
    cases = []
    for at in range(end):
        flipped = bytearray(small)
        flipped[at] ^= int(generator.integers(1, 256))
        cases.append(bytes(flipped))
    refused = hold(tmp_path / "a.gguf", cases, open_all)
    assert refused > 0.6 * end  # what passes changes a token, a score, a value within its range
