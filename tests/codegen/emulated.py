"""Kernels of another architecture, cross-compiled and run by qemu's user emulation.

Debian: apt install g++-aarch64-linux-gnu qemu-user. Where one of them is missing, the tests that
need them say that the processor lacks the instructions.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from aios_compile.codegen.cpp import build
from aios_compile.codegen.source import KernelSource
from aios_compile.errors import BuildError

MAIN = Path(__file__).with_name("emulated_main.cpp")
# Processors that have a target's features and not the next better one's: a kernel that uses more
# dies there of an illegal instruction.
PROCESSORS = {"neon": "cortex-a57", "neondot": "neoverse-n1"}


@functools.lru_cache(maxsize=1)
def emulable() -> tuple[str, ...]:
    """Return the names of the foreign targets that can be compiled and run here."""
    foreign = [target for target, _ in build.TARGETS if target.foreign]
    return tuple(target.name for target in foreign if _has_tools(target))


def _has_tools(target: build.Target) -> bool:
    try:
        build.find_compiler(target)
    except BuildError:
        return False
    return shutil.which(f"qemu-{target.machine}") is not None and target.name in PROCESSORS


def runnable(name: str) -> bool:
    """Return whether a target's kernels run here, on the processor or in the emulator."""
    needs = next(needs for target, needs in build.TARGETS if target.name == name)
    return needs <= build.cpu_features() or name in emulable()


def skip_unless_runnable(name: str) -> None:
    """Skip a test whose target runs neither here nor in an emulator."""
    if not runnable(name):
        pytest.skip(f"the processor lacks the instructions of {name}")


class EmulatedKernels:
    """Kernels in one static program for `target`; call them one at a time."""

    def __init__(self, sources: Sequence[KernelSource], target: build.Target, folder: Path) -> None:
        self.sources, self.target = list(sources), target
        objects = build.build_objects([*sources, ("main", self._main())], folder, target)
        self.program = objects[-1].with_suffix(f".{hash(tuple(objects)):x}.elf")
        built = self.program.with_suffix(f".{os.getpid()}")
        command = [build.find_compiler(target).path, *target.march_flags, "-static"]
        subprocess.run([*command, *objects, "-o", built, "-lm"], check=True)
        os.replace(built, self.program)

    def _main(self) -> str:
        declared, rows = [], []
        for source in self.sources:
            names = [f"{source.symbol}_items", source.symbol]
            declared.append(f"int64_t {names[0]}(const Sizes*);")
            declared.append(f"void {names[1]}(const Sizes*, void* const*, int64_t, int64_t);")
            if source.finishes:
                names += [f"{source.symbol}_finish_items", f"{source.symbol}_finish"]
                declared.append(f"int64_t {names[2]}(const Sizes*, void* const*);")
                declared.append(f"void {names[3]}(const Sizes*, void* const*, int64_t, int64_t);")
            rows.append("{" + ", ".join([*names, "nullptr", "nullptr"][:4]) + "},")
        text = MAIN.read_text()
        names_of = '\nextern "C" {\n' + "\n".join(declared) + "\n}\n"
        return f"{text}{names_of}const Entry table[] = {{{' '.join(rows)}}};\n"

    def run(
        self,
        index: int,
        sizes: Mapping[str, int],
        operands: Sequence[Tensor | np.ndarray],
        splits: int = 1,
        last_only: bool = False,
    ) -> None:
        """Run a kernel on operands, which it changes as if it ran here."""
        ranges = [_memory(operand) for operand in operands]
        buffers, places = _joined(ranges)
        head = [index, splits, int(last_only), *(sizes.get(name, 1) for name in "TSRP")]
        head += [len(buffers), *(len(b) for b in buffers), len(places)]
        for place in places:
            head += place
        job = struct.pack(f"<{len(head)}q", *head) + b"".join(b.tobytes() for b in buffers)
        done = subprocess.run(
            [f"qemu-{self.target.machine}", "-cpu", PROCESSORS[self.target.name], self.program],
            input=job, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.returncode}: {done.stderr.decode()[-2000:]}"
        results, at = done.stdout, 0
        assert len(results) == sum(len(b) for b in buffers)
        for buffer in buffers:
            buffer[:] = np.frombuffer(results, np.uint8, len(buffer), at)
            at += len(buffer)


def _memory(operand: Tensor | np.ndarray) -> np.ndarray:
    """Return an operand's memory as bytes, from its first element to the end of its storage."""
    if isinstance(operand, Tensor):
        storage = operand.untyped_storage()
        first = operand.storage_offset() * operand.element_size()
        return np.frombuffer(_view(storage.data_ptr(), storage.nbytes()), np.uint8)[first:]
    return operand.reshape(-1).view(np.uint8)


def _view(address: int, count: int) -> memoryview:
    return memoryview((ctypes.c_uint8 * count).from_address(address))


def _joined(ranges: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Return disjoint buffers, and of each range its buffer and where in it the range begins.

    Operands may share memory: results that are written in place, rows of one matrix.
    """
    buffers: list[np.ndarray] = []
    places = []
    for one in sorted(ranges, key=lambda r: (r.ctypes.data, -len(r))):
        last = buffers[-1] if buffers else None
        if last is None or one.ctypes.data >= last.ctypes.data + max(1, len(last)):
            buffers.append(one)
    for one in ranges:
        begin = one.ctypes.data
        index = max(i for i, b in enumerate(buffers) if b.ctypes.data <= begin)
        offset = begin - buffers[index].ctypes.data
        assert offset + len(one) <= len(buffers[index]), "operands overlap in part"
        places.append((index, offset))
    return buffers, places
