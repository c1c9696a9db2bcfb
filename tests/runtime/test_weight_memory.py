"""Weights move to huge pages bit for bit, under running readers; and when they stay mapped."""

import itertools
import mmap
import os
import random
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aios_compile.codegen import aligned_map
from aios_compile.codegen.aligned_map import HUGE_PAGE
from aios_compile.codegen.artefact import Artefact, ArtefactWriter, TensorRecord
from aios_compile.codegen.manifest import write_manifest
from aios_compile.runtime import huge_pages, weight_memory
from aios_compile.runtime.weight_memory import WeightMemory

PACKED = {"table": "", "codes": "quant16.int4_g32_f16", "pairs": "pairs16", "norm": ""}
PLENTY = 1 << 40
needs_huge_pages = pytest.mark.skipif(
    not huge_pages.allowed(), reason="the system gives no huge pages"
)


@pytest.fixture
def artefact(tmp_path: Path) -> Any:
    """8 huge pages: the table's own, 6 that hold codes, pairs and some norm, one of the norm."""
    rng = np.random.default_rng(0)
    writer = ArtefactWriter(tmp_path)
    writer.add_tensor("table", rng.standard_normal((HUGE_PAGE // 4, 1)).astype(np.float32))
    codes = rng.integers(0, 255, (3, HUGE_PAGE + 1001), np.uint8)
    writer.add_tensor("codes", codes)
    pairs = rng.integers(0, 65535, (HUGE_PAGE // 64, 2, 16, 2), np.uint16)
    writer.add_tensor("pairs", pairs, "bfloat16")
    writer.add_tensor("norm", np.zeros(3 * HUGE_PAGE // 8, np.float32))
    writer.write_json("program.json", {})
    writer.write_bytes("lib.so", b"")
    writer.finish()
    write_manifest(tmp_path, "key", {})
    opened = Artefact.open(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few weights are enough, pieces are small, nobody waits; the kernel tells nothing."""
    monkeypatch.setattr(weight_memory, "LEAST_BYTES", 0)
    monkeypatch.setattr(weight_memory, "PIECE_BYTES", 2 * HUGE_PAGE)
    monkeypatch.setattr(weight_memory, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(huge_pages, "find", lambda begin, end: None)


PROGRAM: Any = SimpleNamespace(
    weights=[SimpleNamespace(name=name, packed=packed) for name, packed in PACKED.items()]
)


def anonymous_huge_bytes(array: np.ndarray[Any, Any]) -> int:
    """Return what the system says lies in anonymous huge pages, of mappings that begin inside."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if begins := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            inside = 0 <= int(begins[1], 16) - array.ctypes.data < array.nbytes
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) << 10
    return found


@needs_huge_pages
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("aside", [False, True])
def test_streamed_weights_move_bit_for_bit(artefact: Artefact, aside: bool) -> None:
    memory = WeightMemory(artefact, PROGRAM, PLENTY)
    assert memory.in_huge_pages and set(memory.arrays) == set(PACKED)
    want = {name: memory.arrays[name].tobytes() for name in PACKED}
    if aside:
        memory.begin()
        assert memory._thread is not None
        while memory._thread.is_alive():  # a reader never sees a page that is not there yet
            assert all(memory.arrays[name].tobytes() == want[name] for name in PACKED)
    else:
        memory.finish()
    whole = np.frombuffer(artefact.weights, np.uint8)
    assert anonymous_huge_bytes(whole) == 6 * HUGE_PAGE, "not the table's, not the norm's"
    known = "12 in huge pages, 12 of them moved"
    assert memory.line() == f"weights: of 12 MiB that are streamed, {known}"
    for name, array in memory.arrays.items():
        assert array.tobytes() == want[name] == artefact.tensor(name).tobytes(), name
        assert array.ctypes.data == artefact.tensor(name).ctypes.data, "no address changes"
        assert not array.flags.writeable
    artefact.verify_weights()
    del whole, array
    memory.close()
    memory.close()
    artefact.close()
    assert f"{artefact.path}/weights.bin" not in Path("/proc/self/maps").read_text()


@needs_huge_pages
def test_what_lies_in_huge_pages_is_left_there(
    artefact: Artefact, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = WeightMemory(artefact, PROGRAM, PLENTY)
    begin, end = memory._ranges[0]
    there = [(begin + HUGE_PAGE, begin + 2 * HUGE_PAGE), (end - HUGE_PAGE, end)]
    monkeypatch.setattr(
        huge_pages, "find", lambda begin, end: [each for each in there if begin <= each[0] < end]
    )
    memory.finish()
    assert anonymous_huge_bytes(np.frombuffer(artefact.weights, np.uint8)) == 4 * HUGE_PAGE
    memory.close()


@pytest.mark.parametrize("why", ["few", "short memory", "the variable", "no huge pages", "a Mac"])
def test_weights_stay_mapped(
    artefact: Artefact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str
) -> None:
    if why != "few":
        monkeypatch.setattr(weight_memory, "LEAST_BYTES", 0)
    if why == "the variable":
        monkeypatch.setenv("AIOS_HUGE_WEIGHTS", "0")
    if why == "no huge pages":
        (tmp_path / "enabled").write_text("always madvise [never]\n")
        monkeypatch.setattr(huge_pages, "ENABLED", tmp_path / "enabled")
    if why == "a Mac":
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(huge_pages, "replace", lambda begin, end: pytest.fail("moved"))
    free = weight_memory.SPARE_BYTES if why == "short memory" else PLENTY
    memory = WeightMemory(artefact, PROGRAM, free)
    assert not memory.in_huge_pages
    memory.begin()
    assert memory._thread is None
    memory.finish()
    artefact.verify_weights()
    assert ("small ones" in memory.line()) == (why != "few")
    memory.close()


@needs_huge_pages
@pytest.mark.parametrize("why", ["memory is short", "the system has no more huge pages"])
def test_moving_ends_where_it_cannot_go_on(
    artefact: Artefact, small: None, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    memory, count, real = (
        WeightMemory(artefact, PROGRAM, PLENTY),
        iter(range(9)),
        huge_pages.replace,
    )
    if why == "memory is short":
        free = [PLENTY, PLENTY, weight_memory.SPARE_BYTES]
        monkeypatch.setattr(weight_memory, "free_memory_bytes", lambda: free.pop(0))
    else:
        monkeypatch.setattr(
            huge_pages, "replace", lambda begin, end: next(count) < 2 and real(begin, end)
        )
    memory.finish()
    assert not memory.in_huge_pages
    assert memory.line().endswith(f"8 in huge pages, 8 of them moved; {why}")
    artefact.verify_weights()
    memory.close()


@needs_huge_pages
def test_huge_pages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = mmap.mmap(-1, 7 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    at = np.frombuffer(memory, np.uint8).ctypes.data
    begin = -at % HUGE_PAGE
    pages = [begin + i * HUGE_PAGE for i in range(6)]
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for page in pages[:1] + pages[2:5]:
        memory.madvise(mmap.MADV_HUGEPAGE, page, HUGE_PAGE)
    memory.write(bytes(range(256)) * (6 * HUGE_PAGE // 256))  # the last page is not whole
    whole = at + begin, at + begin + 6 * HUGE_PAGE
    found = huge_pages.find(*whole)
    if found is None:
        pytest.skip("this kernel does not say where huge pages are")
    want = [(pages[0], pages[1]), (pages[2], pages[5])]
    assert found == [(at + a, at + b) for a, b in want]
    monkeypatch.setattr(huge_pages, "REGIONS", 1)  # so more than one call
    assert huge_pages.find(*whole) == found
    monkeypatch.setattr(huge_pages, "PAGEMAP", Path("/dev/null"))
    assert huge_pages.find(*whole) is None
    memory.close()


@needs_huge_pages
@pytest.mark.parametrize("call", ["mmap", "madvise", "mprotect", "mremap"])
def test_calls_that_fail_change_nothing(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real = aligned_map.memory_calls()
    failing = lambda *args: huge_pages.FAILED if call in ("mmap", "mremap") else -1  # noqa: E731
    names = {n: getattr(real, n) for n in ("mmap", "madvise", "mprotect", "mremap", "munmap")}
    monkeypatch.setattr(
        huge_pages, "memory_calls", lambda: SimpleNamespace(**names | {call: failing})
    )
    before = Path("/proc/self/maps").read_text().count("\n")
    memory = mmap.mmap(-1, 2 * HUGE_PAGE)
    memory[:] = bytes(range(256)) * (2 * HUGE_PAGE // 256)
    at = np.frombuffer(memory, np.uint8).ctypes.data
    begin = at + -at % HUGE_PAGE
    assert not huge_pages.replace(begin, begin + HUGE_PAGE)
    assert memory[:] == bytes(range(256)) * (2 * HUGE_PAGE // 256)
    memory.close()
    assert Path("/proc/self/maps").read_text().count("\n") <= before + 2, "the copy is unmapped"


def test_closing_stops_within_a_piece(
    artefact: Artefact, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that a thread still moves must not be unmapped, and nobody waits for the rest."""
    monkeypatch.setattr(huge_pages, "allowed", lambda: True)
    began, go_on, ended = threading.Event(), threading.Event(), []

    def slow(begin: int, end: int) -> bool:
        began.set()
        assert go_on.wait(10)
        ended.append(begin)
        return True

    monkeypatch.setattr(huge_pages, "replace", slow)
    memory = WeightMemory(artefact, PROGRAM, PLENTY)
    memory.begin()
    memory.begin()  # once is enough
    assert began.wait(10) and "is being moved" in memory.line()
    threading.Timer(0.05, go_on.set).start()
    memory.close()
    assert len(ended) == 1
    assert memory._thread is not None and not memory._thread.is_alive()


def test_a_forked_child_waits_for_nobody(
    artefact: Artefact, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = WeightMemory(artefact, PROGRAM, PLENTY)
    monkeypatch.setattr(memory, "_stop", None)  # in a child it may be locked for ever
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        memory.close()


def test_pieces_are_what_is_not_there_yet() -> None:
    rng = random.Random(0)
    for _ in range(200):
        cuts = sorted(rng.sample(range(40), 2 * rng.randrange(8)))
        there = list(zip(cuts[::2], cuts[1::2]))
        found = [x for piece in weight_memory._between(0, 40, there) for x in range(*piece)]
        assert found == [x for x in range(40) if not any(a <= x < b for a, b in there)]
        records, offset = [], 0
        for _ in range(rng.randrange(6)):
            offset += rng.choice([0, 64, HUGE_PAGE, 3 * HUGE_PAGE])
            size = rng.choice([64, HUGE_PAGE - 64, HUGE_PAGE, 5 * HUGE_PAGE])
            records.append(TensorRecord(f"{offset}", "uint8", (size,), offset))
            offset += size
        pages = {x for r in records for x in (r.offset, r.offset + r.num_bytes - 1)}
        ranges = weight_memory._whole_pages(reversed(records))
        assert all(any(a <= x < b for a, b in ranges) for x in pages)
        assert all(a % HUGE_PAGE == b % HUGE_PAGE == 0 for a, b in ranges)
        assert all(b < c for (_, b), (c, _) in itertools.pairwise(ranges)), "apart from each other"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_file_is_mapped_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(HUGE_PAGE + 5))
    monkeypatch.setattr(sys, "platform", platform)
    mapped, begin = aligned_map.map_aligned(path)
    view = memoryview(mapped)[begin : begin + HUGE_PAGE + 5]
    assert view == path.read_bytes() and view.readonly
    if platform == "linux":
        assert np.frombuffer(view, np.uint8).ctypes.data % HUGE_PAGE == 0
    with pytest.raises(BufferError):
        mapped.close()
    view.release()
    mapped.close()
    assert str(path) not in Path("/proc/self/maps").read_text()
    with pytest.raises(OSError):
        aligned_map._map_over(1, HUGE_PAGE, 0)
