"""Weights in huge pages are the artefact's, bit for bit; and when they stay mapped."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aios_compile.codegen.artefact import Artefact, ArtefactWriter
from aios_compile.codegen.manifest import write_manifest
from aios_compile.errors import CacheError
from aios_compile.runtime import weight_memory
from aios_compile.runtime.weight_memory import WeightMemory

PACKED = {"table": "", "codes": "quant16.int4_g32_f16", "pairs": "pairs16", "norm": ""}
PLENTY = 1 << 40


@pytest.fixture
def artefact(tmp_path: Path) -> Any:
    rng = np.random.default_rng(0)
    writer = ArtefactWriter(tmp_path)
    writer.add_tensor("table", rng.standard_normal((5, 7)).astype(np.float32))
    writer.add_tensor("codes", rng.integers(0, 255, (3, 1001)).astype(np.uint8))
    pairs = rng.integers(0, 65535, (2, 9, 16, 2)).astype(np.uint16)
    writer.add_tensor("pairs", pairs, "bfloat16")
    writer.add_tensor("norm", rng.standard_normal(33).astype(np.float32))
    writer.write_json("program.json", {})
    writer.write_bytes("lib.so", b"")
    writer.finish()
    write_manifest(tmp_path, "key", {})
    opened = Artefact.open(tmp_path)
    yield opened
    opened.close()


PROGRAM: Any = SimpleNamespace(
    weights=[SimpleNamespace(name=name, packed=packed) for name, packed in PACKED.items()]
)


def test_streamed_weights_are_copied_bit_for_bit(
    artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_memory, "LEAST_BYTES", 0)
    monkeypatch.setattr(weight_memory, "READ_BYTES", 1000)  # several pieces a tensor
    monkeypatch.setattr(weight_memory, "huge_pages_allowed", lambda: True)
    memory = WeightMemory(artefact, PROGRAM, 2, PLENTY)
    assert memory.in_huge_pages and set(memory.arrays) == set(PACKED)
    mapped = np.frombuffer(artefact.weights, np.uint8)
    inside = range(mapped.ctypes.data, mapped.ctypes.data + len(mapped))
    for name, array in memory.arrays.items():
        want = artefact.tensor(name)
        assert array.dtype == want.dtype and array.tobytes() == want.tobytes(), name
        assert array.shape == want.shape and not array.flags.writeable
        assert array.ctypes.data % 64 == 0
        assert (array.ctypes.data in inside) == (PACKED[name] == ""), name
    assert memory.arrays["codes"].ctypes.data % weight_memory.HUGE_PAGE == 0
    del mapped, array, want
    memory.close()
    memory.close()


@pytest.mark.parametrize("why", ["few", "short memory", "the variable", "no huge pages"])
def test_weights_stay_mapped(
    artefact: Artefact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str
) -> None:
    if why != "few":
        monkeypatch.setattr(weight_memory, "LEAST_BYTES", 0)
    if why == "the variable":
        monkeypatch.setenv("AIOS_HUGE_WEIGHTS", "0")
    if why == "no huge pages":
        (tmp_path / "enabled").write_text("always madvise [never]\n")
        monkeypatch.setattr(weight_memory, "ENABLED", tmp_path / "enabled")
    free = weight_memory.SPARE_BYTES if why == "short memory" else PLENTY
    memory = WeightMemory(artefact, PROGRAM, 1, free)
    assert not memory.in_huge_pages
    for name, array in memory.arrays.items():
        assert array.ctypes.data == artefact.tensor(name).ctypes.data
    del array
    memory.close()


def test_a_file_that_ends_early(artefact: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_memory, "LEAST_BYTES", 0)
    monkeypatch.setattr(weight_memory, "huge_pages_allowed", lambda: True)
    assert len(artefact.weights) > 500  # mapped while it was whole
    with open(artefact.path / "weights.bin", "r+b") as file:
        file.truncate(500)
    memory = WeightMemory(artefact, PROGRAM, 1, PLENTY)
    for _ in range(2):  # who asks again is told again
        with pytest.raises(CacheError, match="ends at byte 500"):
            _ = memory.arrays
    memory.close()


def test_closing_waits_for_reads(artefact: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a thread still reads into must not be unmapped."""
    monkeypatch.setattr(weight_memory, "LEAST_BYTES", 0)
    monkeypatch.setattr(weight_memory, "huge_pages_allowed", lambda: True)
    began, ended, real = threading.Event(), [], os.preadv

    def slow(*args: Any) -> int:
        began.set()
        time.sleep(0.05)
        count = real(*args)
        ended.append(count)
        return count

    monkeypatch.setattr(os, "preadv", slow)
    memory = WeightMemory(artefact, PROGRAM, 1, PLENTY)
    began.wait()
    memory.close()
    assert len(ended) == 1  # the one that had begun; the second tensor was never read
