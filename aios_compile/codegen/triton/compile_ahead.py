"""Compile Triton modules for a GPU without a GPU, in processes side by side, and say what they use.

    binaries = compile_ahead([source, ...], "cuda:90", folder)
    python -m aios_compile.codegen.triton.compile_ahead cuda:90 OUT MODULE.py...

A process imports its modules with the interpreter off, compiles each launch of each variant as if
every pointer were aligned to 16 bytes, and leaves PTX (or AMD assembly) and the binary in a folder
of OUT for each. MODULE.py:3 is the third launch alone, counted from nought.
Registers, stack and spills are read with the cuobjdump of the triton wheel.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.binary_cache import Known, every_launch, settle_keys
from aios_compile.codegen.triton.occupancy import Usage
from aios_compile.errors import CodegenError

REPORT = "binaries.json"
CACHE = "triton_cache"  # the folder of Triton's cache below that of the modules
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Binary:
    """One compiled launch. Bytes of shared memory are a block's, spills a thread's."""

    kernel: str
    most: int | None
    constexprs: dict[str, Any]
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    text: str
    binary: str

    def usage(self) -> Usage:
        """Return what one program uses of a multiprocessor."""
        return Usage(self.registers, self.shared_bytes, self.num_warps, self.spill_bytes)

    def assembly(self) -> str:
        """Return the PTX, or AMD's assembly."""
        return Path(self.text).read_text()


def parse_target(name: str) -> Any:
    """Return Triton's target of "cuda:90" or "hip:gfx942". Raises CodegenError for another name."""
    from triton.backends.compiler import GPUTarget

    kind, _, arch = name.partition(":")
    if kind == "cuda" and arch.isdigit():
        return GPUTarget("cuda", int(arch), 32)
    if kind == "hip" and arch:
        return GPUTarget("hip", arch, 64)
    raise CodegenError(
        f"unknown GPU target {name!r}", advice="say cuda:80, cuda:90, cuda:100 or hip:gfx942"
    )


def compile_ahead(
    sources: Sequence[KernelSource],
    target: str,
    folder: Path,
    jobs: int = 2,
    only: Mapping[str, int] | None = None,
) -> list[list[Binary]]:
    """Compile every variant of every module; return the binaries of each source, in order.

    only: symbol -> number of the one launch of that module to compile. Raises CodegenError with the
    compiler's message when a module does not compile for the target.
    """
    parse_target(target)
    out = folder / target.replace(":", "_")
    for source in sources:
        (out / source.symbol).mkdir(parents=True, exist_ok=True)
        (out / source.symbol / REPORT).unlink(missing_ok=True)
        (folder / f"{source.symbol}.py").write_text(source.text)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[3])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    environment["TRITON_CACHE_DIR"] = str(folder / CACHE)

    def some(group: Sequence[KernelSource]) -> None:
        """Compile a process's share: to begin costs it what a launch or two cost."""
        command = [sys.executable, "-m", __name__, target, str(out)]
        for source in group:
            number = (only or {}).get(source.symbol)
            suffix = "" if number is None else f":{number}"
            command.append(f"{folder / source.symbol}.py{suffix}")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            failed = next(s.symbol for s in group if not (out / s.symbol / REPORT).exists())
            causes = [x for x in done.stderr.splitlines() if x and not x.startswith(" ")]
            told = " | ".join(causes)[:2000]  # Triton tells the innermost cause first
            raise CodegenError(f"{failed} does not compile for {target}: {told}")

    with ThreadPoolExecutor(jobs) as pool:
        groups = [sources[i::jobs] for i in range(min(jobs, len(sources)))]
        list(pool.map(some, groups))
    reports = [json.loads((out / s.symbol / REPORT).read_text()) for s in sources]
    return [[Binary(**row) for row in report] for report in reports]


def compile_module(path: Path, target: str, out: Path, only: int | None = None) -> list[Binary]:
    """Compile every launch of a module's variants in this process, or the one of that number."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settle_keys(module)
    launches = [
        known
        for known in every_launch(module)
        if hasattr(known.launch["kernel"], "arg_names")  # not a library's product
    ]
    made = [
        _compiled(module, known, target, out / f"{known.launch['kernel'].__name__}_{number}")
        for number, known in enumerate(launches)
        if only in (None, number)
    ]
    return [binary for binary in made if binary is not None]


def _compiled(module: Any, known: Known, target: str, place: Path) -> Binary | None:
    """Return the binary of a launch; None for a candidate that does not compile: nobody needs it,
    and who chooses finds that it does not run.
    """
    try:
        return _compile(module, known.launch, known.most, target, place)
    except Exception:
        if known.candidate:
            return None
        raise


def _compile(module: Any, launch: Any, most: int | None, target: str, place: Path) -> Binary:
    import triton
    from triton.compiler import ASTSource, compile

    kernel, constexprs = launch["kernel"], launch["constexprs"]
    given = [module.TYPES[i] for i in launch.get("operands", range(len(module.TYPES)))]
    operands = kernel.arg_names[: len(given)]
    types = dict(zip(operands, given))
    types |= dict.fromkeys("TSRP", "i32") | dict.fromkeys(constexprs, "constexpr")
    attributes: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i in range(len(operands))}
    # From 3.7 on a launch lists constexprs too, with nothing: Triton's key of a kernel covers that.
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        attributes |= {(kernel.arg_names.index(name),): [] for name in constexprs}
    source = ASTSource(kernel, types, constexprs=constexprs, attrs=attributes)
    made = compile(source, target=parse_target(target), options=dict(launch["options"]))
    cuda = target.startswith("cuda")
    text, binary = place.with_suffix(".ptx" if cuda else ".s"), place.with_suffix(".bin")
    text.write_text(made.asm["ptx" if cuda else "amdgcn"])
    if cuda and "\ttrap;" in text.read_text():
        # Triton 3.7 turns a tile that does not fit tensor memory into a trap instead of an error.
        raise CodegenError(f"{kernel.__name__} {dict(constexprs)} compiles to a trap for {target}")
    binary.write_bytes(made.asm["cubin" if cuda else "hsaco"])
    registers, spills = _cuda_usage(binary) if cuda else _amd_usage(text.read_text())
    return Binary(
        kernel.__name__, most, dict(constexprs), made.metadata.num_warps, registers, spills,
        made.metadata.shared, str(text), str(binary),
    )  # fmt: skip


def _cuda_usage(binary: Path) -> tuple[int, int]:
    """Return (registers, bytes of stack and local memory) of the one kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, found)) for found in USAGE.findall(report)]
    registers = max(row[0] for row in rows)
    return registers, max(row[1] + row[3] for row in rows)


def _amd_usage(text: str) -> tuple[int, int]:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    return value("vgpr_count"), 4 * value("vgpr_spill_count")


def main() -> None:
    target, out = sys.argv[1], Path(sys.argv[2])
    for given in sys.argv[3:]:
        head, _, number = given.rpartition(".py:")
        path = Path(f"{head}.py" if head else given)
        own = out / path.stem
        binaries = compile_module(path, target, own, int(number) if head else None)
        (own / REPORT).write_text(json.dumps([asdict(b) for b in binaries]))


if __name__ == "__main__":
    main()
