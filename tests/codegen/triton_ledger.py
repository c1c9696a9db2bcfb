"""A ledger of kernels compiled ahead of time: what each launch uses, sealed by what decides it.

A line a kernel: `seal | target model | emitter | title | launch registers shared | ...`. The seal
is a digest of all that decides the binaries (the module's text without comments and names, how
compile_ahead calls the compiler, target, versions of Triton and ptxas) and of the rest of the line.
A kernel whose seal is right was compiled before with these very numbers; any other is compiled by
`hold`. `UPDATE_RESOURCES=1` writes the lines of what is compiled anew.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import inspect
import io
import os
import re
import subprocess
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import compile_ahead
from aios_compile.codegen.triton.compile_ahead import Binary

NAME_DIGEST = re.compile(r"_[0-9a-f]{8,10}(?=_|$)")
STREAMING = ("linear", "quantized_linear", "fp8_linear", "kv_write_attention", "paged_attention")
WIDE = ("v4.b32", "cp.async.cg.shared.global", "load_dwordx4")  # 16 bytes
Compile = Callable[[Sequence[KernelSource], str, Mapping[str, int]], list[list[Binary]]]


@dataclass(frozen=True)
class Kernel:
    """A kernel of a model's plan for a target."""

    target: str
    model: str
    source: KernelSource

    @property
    def label(self) -> str:
        """Return what finds its line; it has no digest of the kernel's text."""
        name = NAME_DIGEST.sub("", self.source.name)
        title = self.source.text.partition("\n")[0].lstrip("# ")[:60]
        return f"{self.target} {self.model} | {self.source.emitter} | {name}: {title}"

    @functools.cached_property
    def digest(self) -> str:
        """A digest of all that decides the binaries."""
        text = re.sub(
            rf"\b{self.source.symbol}(?=\b|_)", "kernel", without_comments(self.source.text)
        )
        parts = (compiler(), _how_it_is_compiled(), self.target, text)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Ledger:
    """The lines of a file. compiler: what wrote them; known: it is the one at hand."""

    def __init__(self, file: Path) -> None:
        self.file = file
        first, *lines = file.read_text().splitlines() if file.exists() else [""]
        self.compiler = first
        self.known = first == compiler()
        split = (line.split(" | ") for line in lines)
        self.rows = {" | ".join(row[1:4]): (row[0], tuple(row[4:])) for row in split}
        assert len(self.rows) == len(lines), "two kernels of one label"

    def holds(self, kernel: Kernel) -> bool:
        """Return whether its numbers are those of the kernel as it is."""
        seal, used = self.rows.get(kernel.label, ("", ()))
        return self.known and seal == _seal(kernel, used)

    def sample(self, *, shift: int = 0) -> dict[str, int]:
        """Return for each emitter and target the label of a kernel of it, and which launch of it.

        Fixed by the file; from target to target another model, kernel and launch.
        """
        groups: dict[tuple[str, str], list[str]] = {}
        for label in sorted(self.rows):
            target, emitter = label.split(" ")[0], label.split(" | ")[1]
            groups.setdefault((target, emitter), []).append(label)
        targets = sorted({target for target, _ in groups})
        found = {}
        for (target, emitter), labels in groups.items():
            turn = targets.index(target) + len(emitter) + shift
            label = labels[turn * 7 % len(labels)]
            found[label] = turn % len(self.rows[label][1])
        return found

    def write(self, compiled: Mapping[Kernel, Sequence[Binary]]) -> None:
        """Put lines of what was compiled into the file, which other processes may write too."""
        with _locked(self.file.parent):
            rows = dict(Ledger(self.file).rows)
            for kernel, binaries in compiled.items():
                used = tuple(map(used_by, binaries))
                rows[kernel.label] = (_seal(kernel, used), used)
            text = [" | ".join((seal, k, *used)) for k, (seal, used) in sorted(rows.items())]
            self.file.write_text("\n".join([compiler(), *text, ""]))


def hold(
    kernels: Sequence[Kernel], ledger: Ledger, compiled_by: Compile, everything: bool = False
) -> dict[Kernel, list[Binary]]:
    """Compile the kernels that the ledger does not hold, and the sample; return their binaries.

    What is compiled may not spill, streams 16 bytes a load, and uses what is pinned. With another
    compiler than the ledger's the sample alone is compiled, its resources are not compared.
    everything: compile all.
    """
    labels = [kernel.label for kernel in kernels]
    assert len({*labels}) == len(labels), [k for k, n in Counter(labels).items() if n > 1]
    sample = ledger.sample()
    moved = [k for k in kernels if not ledger.holds(k)] if ledger.known else []
    updates = bool(os.environ.get("UPDATE_RESOURCES"))
    whole = list(kernels) if everything or (updates and not ledger.known) else moved
    parts = [k for k in kernels if k.label in sample and k not in whole]
    found: dict[Kernel, list[Binary]] = {}
    for target in dict.fromkeys(k.target for k in kernels):
        given = [k for k in (*whole, *parts) if k.target == target]
        only = {k.source.symbol: sample[k.label] for k in given if k not in whole}
        found |= zip(given, compiled_by([k.source for k in given], target, only))
    for kernel, binaries in found.items():
        check(kernel, binaries)
    if updates:
        ledger.write({k: found[k] for k in whole})
    elif not ledger.known:
        warnings.warn(
            f"{ledger.file.name} is of {ledger.compiler or 'no compiler'}, this is {compiler()}: "
            f"{len(found)} of {len(kernels)} kernels were compiled and may not spill, what they "
            "use is compared with nothing",
            stacklevel=2,
        )
    else:
        _compare(found, ledger, sample, whole)
        if moved:
            told = "; ".join(k.label for k in moved[:4])
            warnings.warn(
                f"{len(moved)} kernels were compiled, their text is not the pinned one; "
                f"UPDATE_RESOURCES=1 pins it: {told}",
                stacklevel=2,
            )
    return found


def check(kernel: Kernel, binaries: Sequence[Binary]) -> None:
    """Assert that no launch spills, and that what streams loads 16 bytes at a time."""
    # sine and cosine keep a table for large angles in local memory, which counts as spills
    known = "tl.cos(" in kernel.source.text
    for binary in binaries:
        assert known or binary.spill_bytes == 0, (kernel.label, binary)
        if kernel.source.emitter in STREAMING and streams(binary):
            assert any(x in binary.assembly() for x in WIDE), (kernel.label, binary)


def streams(binary: Binary) -> bool:
    """Return whether a launch of a linear or of attention reads weights or pages at decode."""
    return binary.most is not None and binary.most <= 32 and "combine" not in binary.kernel


def used_by(binary: Binary) -> str:
    """Return a launch's name without the module's, its number of rows, and what it uses."""
    name = NAME_DIGEST.split(binary.kernel)[-1].lstrip("_")
    most = str(binary.most or "any")
    name = name if name.endswith(f"_{most}") else f"{name}_{most}".lstrip("_")
    return f"{name} {binary.registers} {binary.shared_bytes}"


@functools.lru_cache(maxsize=512)
def without_comments(text: str) -> str:
    """Return a module's text without comments (model lines, reasons) and blank lines.

    It may import nothing but triton: what else it read would not be in the digest.
    """
    lines = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    kept = [line.rstrip() for line in lines if line.strip()]
    imports = {line for line in kept if line.lstrip().startswith(("import ", "from "))}
    assert imports <= {"import triton", "import triton.language as tl"}, imports
    return "\n".join(kept)


@functools.cache
def compiler() -> str:
    """Return the versions of Triton and of the assemblers that its wheel brings."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    told = [f"triton {triton.__version__}"]
    for tool in sorted(folder.glob("ptxas*")):
        command = [str(tool), "--version"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        told.append(f"{tool.name} {text.split()[-1]}")
    return ", ".join(told)


@functools.cache
def _how_it_is_compiled() -> str:
    functions = (compile_ahead.compile_module, compile_ahead._compile)
    return "\0".join(map(inspect.getsource, functions))


def _seal(kernel: Kernel, used: Iterable[str]) -> str:
    text = " | ".join((kernel.digest, kernel.label, *used))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compare(
    found: Mapping[Kernel, Sequence[Binary]],
    ledger: Ledger,
    sample: Mapping[str, int],
    whole: Sequence[Kernel],
) -> None:
    """Assert that each binary uses what its line says."""
    wrong = []
    for kernel, binaries in found.items():
        _, pinned = ledger.rows.get(kernel.label, ("", ()))
        expected = pinned if kernel in whole else pinned[sample[kernel.label] :][:1]
        used = tuple(map(used_by, binaries))
        if used != expected:
            wrong.append(f"{kernel.label}: {used}, pinned {expected or 'nowhere'}")
    assert not wrong, "\n".join([*wrong, "UPDATE_RESOURCES=1 pins what is right"])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
