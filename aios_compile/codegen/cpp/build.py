"""Compile generated C++ with the system compiler, one process a kernel, into one shared library.

Torch-free. Objects are content-addressed: text, headers, compiler version and flags are the key, so
a kernel that did not change is never compiled twice, and two processes that build the same object
write the same bytes and rename them into place.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from aios_compile import env
from aios_compile.codegen.cpp.precompiled import PRELUDE, PROGRAM, STEP, precompile
from aios_compile.codegen.source import KernelSource
from aios_compile.errors import BuildError

HEADER_FOLDER = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
PACKAGES = "apt install g++, dnf install gcc-c++, xcode-select --install"
# The floating-point policy: a product and a sum are fused where the text says fma, nowhere else; no
# fast-math; sqrt sets no errno, so that it is one instruction. Whole numbers wrap, as in torch.
FLAGS = (
    *("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fwrapv"),
    *("-fPIC", "-pthread", "-Wno-psabi"),
)
LINK_FLAGS = ("-shared", "-pthread", "-lm")
MESSAGE_LINES = 12
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

Source = KernelSource | tuple[str, str]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Target:
    """The instruction set that kernels are compiled for. `vector_bytes` is one register's width.

    machine: the architecture that has it, as in a compiler's name; "" for any.
    """

    name: str
    march_flags: tuple[str, ...]
    vector_bytes: int
    machine: str = ""

    @property
    def bf16_dot(self) -> bool:
        """Whether it has dot products of pairs of bf16 (vdpbf16ps)."""
        return "-mavx512bf16" in self.march_flags

    @property
    def foreign(self) -> bool:
        """Whether only a cross-compiler makes its code here."""
        return self.machine not in ("", host_machine())

    @staticmethod
    def host() -> Target:
        """Return the widest target that this machine runs."""
        have = cpu_features()
        return next(target for target, needs in TARGETS if needs <= have)

    @staticmethod
    def named(name: str) -> Target:
        """Return a target by name; raises KeyError with the known names."""
        known = {target.name: target for target, _ in TARGETS}
        if name not in known:
            raise KeyError(f"target {name!r} is unknown (known: {', '.join(known)})")
        return known[name]


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")


def _x86(name: str, vector_bytes: int, *features: str) -> tuple[Target, frozenset[str]]:
    """Return a target and its features; Linux writes avx512_vnni for what gcc calls avx512vnni."""
    flags = tuple(f"-m{f.replace('_', '')}" for f in features)
    return Target(name, flags, vector_bytes, "x86_64"), frozenset(features)


def _arm(name: str, flags: tuple[str, ...], *features: str) -> tuple[Target, frozenset[str]]:
    return Target(name, flags, 16, "aarch64"), frozenset(features)


# From wide to narrow, each with the processor features that it needs. The last needs none. VNNI and
# dotprod are dot products of bytes, avx512_bf16 those of bf16.
TARGETS: tuple[tuple[Target, frozenset[str]], ...] = (
    _x86("avx512bf16", 64, *_AVX512, "avx512_vnni", "avx512_bf16"),
    _x86("avx512vnni", 64, *_AVX512, "avx512_vnni"),
    _x86("avx512", 64, *_AVX512),
    _x86("avxvnni", 32, *_AVX2, "avx_vnni"),
    _x86("avx2", 32, *_AVX2),
    _arm("neondot", ("-march=armv8.2-a+dotprod",), "asimd", "asimddp"),
    _arm("neon", (), "asimd"),
    (Target("portable", (), 16), frozenset()),
)


def host_machine() -> str:
    """Return this machine's architecture as compilers spell it: x86_64, aarch64."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def cpu_features() -> frozenset[str]:
    """Return the processor's feature names as Linux spells them; empty where they are unknown."""
    base = frozenset({"asimd"} if host_machine() == "aarch64" else ())  # of every such processor
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return base
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return base | frozenset(found.group(1).split()) if found else base


@functools.cache
def cache_bytes(level: int) -> int:
    """Return the bytes of the first core's cache of a level as Linux tells them; 0: it does not."""
    for folder in sorted(CACHES.glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "level").read_text().strip() == str(level):
                return int((folder / "size").read_text().strip().removesuffix("K")) << 10
    return 0


def l2_bytes() -> int:
    """Return the bytes of a core's second-level cache; 512 KiB where they are not known.

    It decides how many prepared tokens are used again while they lie there (tiles.h): time, no bit.
    """
    return cache_bytes(2) or 512 << 10


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its path and the first line of `--version`."""

    path: str
    version: str


def find_compiler(target: Target | None = None) -> Compiler:
    """Return the compiler named by AIOS_CXX, else the first of c++, g++, clang++ on the PATH.

    For a target of another architecture it is the cross-compiler: aarch64-linux-gnu-g++. Raises
    BuildError when there is none.
    """
    cross = target.machine if target is not None and target.foreign else ""
    return _find_compiler(env.CXX.get(), os.environ.get("PATH", ""), cross)


@functools.lru_cache(maxsize=8)
def _find_compiler(chosen: str, path: str, cross: str) -> Compiler:
    usual = (f"{cross}-linux-gnu-g++",) if cross else COMPILERS
    names = (chosen,) if chosen else usual
    for name in names:
        found = shutil.which(name, path=path)
        if found is None:
            continue
        try:
            run = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
        except OSError:
            continue
        if run.returncode == 0:
            return Compiler(found, run.stdout.splitlines()[0] if run.stdout else "unknown")
    kind = f"C++ compiler for {cross}" if cross else "C++ compiler"
    where = f"AIOS_CXX={chosen!r} is not a C++ compiler" if chosen else f"no {kind} was found"
    package = f"apt install g++-{cross.replace('_', '-')}-linux-gnu" if cross else PACKAGES
    raise BuildError(
        f"{where}: looked for {', '.join(names)} on the PATH",
        advice=f"install g++ ({package}) or set AIOS_CXX to the path of g++ or clang++",
    )


@functools.lru_cache(maxsize=1)
def headers_text() -> str:
    """Return the text of all headers that kernels include; part of every object's key."""
    return "\0".join(path.read_text() for path in sorted(HEADER_FOLDER.glob("*.h")))


def compile_flags(target: Target, extra_flags: Sequence[str] = ()) -> tuple[str, ...]:
    """Return every flag of a compilation but for the file names and the include folder."""
    own = () if target.foreign else (f"-DAIOS_L2_BYTES={l2_bytes()}",)
    return (*FLAGS, *target.march_flags, *own, *extra_flags)


def _toolchain(target: Target) -> str:
    version = find_compiler(target).version
    return f"{version} for {target.machine}" if target.foreign else version


def object_key(text: str, target: Target, extra_flags: Sequence[str] = ()) -> str:
    """Return the name under which the object of `text` is cached: a sha256 in hex."""
    parts = (text, headers_text(), _toolchain(target), *compile_flags(target, extra_flags))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def build_objects(
    sources: Sequence[Source],
    folder: Path,
    target: Target,
    jobs: int | None = None,
    on_progress: Progress | None = None,
    extra_flags: Sequence[str] = (),
    many_programs: bool = False,
) -> list[Path]:
    """Compile each source to an object in `folder`, in parallel; return them in source order.

    `sources` are KernelSources or (name, text) pairs. `jobs` defaults to the number of
    processors. `on_progress(done, total, name)` is called in the caller's thread. `extra_flags` are
    for sanitizer builds. `many_programs`: these flags build many, so that to precompile what their
    steps include pays. Raises BuildError that names the kernel and quotes the compiler.
    """
    pairs = [(s.name, s.text) if isinstance(s, KernelSource) else s for s in sources]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    find_compiler(target)
    objects = [folder / f"{object_key(text, target, extra_flags)}.o" for _, text in pairs]
    missing = {path: pair for path, pair in zip(objects, pairs) if not path.exists()}
    done = len(pairs) - len(missing)
    chosen = {path: _headers(text, many_programs) for path, (_, text) in missing.items()}
    includes = {h: _includes(folder, target, tuple(extra_flags), h) for h in chosen.values()}
    with ThreadPoolExecutor(max(1, jobs or os.cpu_count() or 1)) as pool:
        futures = {
            pool.submit(
                _compile, name, text, path, target, tuple(extra_flags), includes[chosen[path]]
            ): name
            for path, (name, text) in missing.items()
        }
        try:
            for future in as_completed(futures):
                future.result()
                done += 1
                if on_progress is not None:
                    on_progress(done, len(pairs), futures[future])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return objects


def prepare(folder: Path, target: Target) -> None:
    """Do ahead what the first `build_objects` in `folder` would do before any kernel: 0.8 s.

    Raises BuildError as that would.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _includes(folder, target, (), (PRELUDE,))


def _headers(text: str, many_programs: bool) -> tuple[str, ...]:
    """Return the headers that are precompiled for a source."""
    return PROGRAM if many_programs and f'#include "{STEP}"' in text else (PRELUDE,)


def _includes(
    folder: Path, target: Target, extra_flags: tuple[str, ...], names: tuple[str, ...]
) -> list[str]:
    """Return the include folders' arguments, that of the precompiled headers first."""
    compiler, flags = find_compiler(target).path, compile_flags(target, extra_flags)
    headers, key = [HEADER_FOLDER / name for name in names], headers_text()
    ready = precompile(folder, headers, compiler, _toolchain(target), flags, key, _run)
    return [*ready, "-I", str(HEADER_FOLDER)]


def _compile(
    name: str,
    text: str,
    path: Path,
    target: Target,
    extra_flags: tuple[str, ...],
    includes: list[str],
) -> None:
    source = path.with_suffix(".cpp")
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as aside:
        kernel = Path(aside) / f"{re.sub(r'[^A-Za-z0-9_]', '_', name)}.cpp"
        kernel.write_text(text)
        built = kernel.with_suffix(".o")
        command = [find_compiler(target).path, *compile_flags(target, extra_flags)]
        command += [*includes, "-c", str(kernel), "-o", str(built)]
        _run(command, f"kernel {name}", "a generated kernel must compile: please report it")
        os.replace(kernel, source)
        os.replace(built, path)


def _run(command: list[str], what: str, advice: str) -> None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{what}: cannot run {command[0]}: {error}", advice=advice) from error
    if run.returncode == 0:
        return
    lines = run.stderr.splitlines()
    first = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
    quoted = "\n".join(lines[first : first + MESSAGE_LINES])
    raise BuildError(
        f"{what}: {command[0]} failed with status {run.returncode}\n{quoted}", advice=advice
    )


def link(
    objects: Iterable[Path],
    out_path: Path,
    target: Target | None = None,
    extra_flags: Sequence[str] = (),
) -> Path:
    """Link objects into the shared library `out_path`, atomically; return it.

    Pass the target and the flags that the objects were compiled with. Raises BuildError.
    """
    out_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    march = target.march_flags if target else ()
    with tempfile.TemporaryDirectory(prefix=".link-", dir=out_path.parent) as aside:
        built = Path(aside) / out_path.name
        command = [find_compiler(target).path, *march, *extra_flags, "-fPIC", "-o", str(built)]
        command += [*(str(path) for path in objects), *LINK_FLAGS]
        _run(command, f"linking {out_path.name}", "free disk space, or remove the cache folder")
        os.replace(built, out_path)
    return out_path


def unload(library: ctypes.CDLL) -> None:
    """Unmap a library. Nothing may hold a pointer into it, and its threads must have ended."""
    _ctypes.dlclose(library._handle)


def load(path: Path) -> ctypes.CDLL:
    """Load a linked library.

    Raises BuildError when the folder cannot execute or the file is bad.
    """
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        if "failed to map segment" in str(error) or "Operation not permitted" in str(error):
            raise BuildError(
                f"{path}: the folder is on a file system that does not execute code (noexec)",
                advice="set AIOS_CACHE_DIR to a folder on a file system mounted with exec",
            ) from error
        raise BuildError(
            f"{path}: the library cannot be loaded: {error}",
            advice="remove it from the cache and build it again",
        ) from error
