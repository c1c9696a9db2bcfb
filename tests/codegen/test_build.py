"""The builder: cache, errors, targets; generated kernels under ASan and UBSan."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aios_compile.codegen.cpp import (
    build,
    embedding,
    matmul,
    pointwise,
    precompiled,
    row_reduction,
)
from aios_compile.codegen.operand import dim_value
from aios_compile.errors import BuildError
from tests.codegen.kernels import operands_of, trace

GOOD = '#include "prelude.h"\nextern "C" float f(float x) { return exp(x) + 1.0f; }\n'


def test_objects_are_cached_by_content(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    host = build.Target.host()

    def build_all(texts: list[str]) -> list[Path]:
        pairs = [(f"k{i}", text) for i, text in enumerate(texts)]
        return build.build_objects(
            pairs, tmp_path, host, jobs=2, on_progress=lambda *row: seen.append(row)
        )

    first = build_all([GOOD, GOOD + "// other\n"])
    assert [row[:2] for row in seen] == [(1, 2), (2, 2)]
    stamp = first[0].stat().st_mtime_ns
    second = build_all([GOOD, GOOD + "// third\n"])
    assert second[0] == first[0] and second[0].stat().st_mtime_ns == stamp
    assert seen[2:] == [(2, 2, "k1")]
    assert not list(tmp_path.glob(".build-*"))


def test_the_key_covers_text_target_flags_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    host, portable = build.Target.named("avx2"), build.Target.named("portable")
    keys = {build.object_key(GOOD, host), build.object_key(GOOD + " ", host)}
    keys |= {build.object_key(GOOD, portable), build.object_key(GOOD, host, ("-g",))}
    monkeypatch.setattr(build, "headers_text", lambda: "other headers")
    keys.add(build.object_key(GOOD, host))
    monkeypatch.setattr(build, "find_compiler", lambda *_: build.Compiler("c++", "other version"))
    keys.add(build.object_key(GOOD, host))
    assert len(keys) == 6


def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path) -> None:
    pairs = [("good", GOOD), ("broken", "int f() { return missing; }\n")]
    with pytest.raises(BuildError, match=r"kernel broken: .* failed with status 1") as caught:
        build.build_objects(pairs, tmp_path, build.Target.host())
    assert "missing" in str(caught.value) and "try:" in str(caught.value)


def test_no_compiler_gives_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found") as caught:
        build.find_compiler()
    assert "install g++" in str(caught.value)
    monkeypatch.setenv("AIOS_CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="AIOS_CXX='no-such-compiler' is not a C"):
        build.find_compiler()


def test_a_foreign_target_needs_a_cross_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "host_machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", str(tmp_path))
    target = build.Target.named("neondot")
    assert target.foreign and not build.Target.named("portable").foreign
    with pytest.raises(BuildError, match=r"no C.. compiler for aarch64 was found") as caught:
        build.build_objects([("good", GOOD)], tmp_path / "objects", target)
    assert "apt install g++-aarch64-linux-gnu" in str(caught.value)
    cross = tmp_path / "aarch64-linux-gnu-g++"
    cross.write_text("#!/bin/sh\necho a cross-compiler\n")
    cross.chmod(0o755)
    assert build.find_compiler(target) == build.Compiler(str(cross), "a cross-compiler")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert build.find_compiler(target) == build.Compiler(str(cross), "a cross-compiler")
    assert build.find_compiler().path != str(cross)


def test_an_unknown_instruction_set_is_refused(tmp_path: Path) -> None:
    from aios_compile.errors import CodegenError
    from aios_compile.study.cpu_compile import compile_for

    with pytest.raises(CodegenError, match=r"'sse9' is unknown .known: avx512bf16"):
        compile_for("model", "sse9", tmp_path, {})


def test_a_folder_that_cannot_execute_gives_advice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """glibc's words for a library on a noexec mount."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(f"{tmp_path}/x.so: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(BuildError, match="noexec") as caught:
        build.load(tmp_path / "x.so")
    assert "AIOS_CACHE_DIR" in str(caught.value)


def test_a_damaged_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"\x7fELF nothing")
    with pytest.raises(BuildError, match="cannot be loaded"):
        build.load(tmp_path / "x.so")


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, name in (
        ({"avx2", "fma", "f16c"}, "avx2"),
        ({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}, "avx512"),
        ({"avx2", "fma", "f16c", "avx512f"}, "avx2"),
        (
            {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
            "avx512vnni",
        ),
        (
            {*build.TARGETS[1][1], "avx512_bf16"},
            "avx512bf16",
        ),
        ({"avx2", "fma", "f16c", "avx_vnni"}, "avxvnni"),
        ({"asimd"}, "neon"),
        ({"asimd", "asimddp"}, "neondot"),
        (set(), "portable"),
    ):
        monkeypatch.setattr(build, "cpu_features", lambda found=frozenset(features): found)
        assert build.Target.host().name == name
        assert build.Target.host().bf16_dot == (name == "avx512bf16")
    with pytest.raises(KeyError, match="known: avx512"):
        build.Target.named("sse9")


RUNNER = '''
"""Call kernels on numpy arrays of exactly the size that they may touch. No torch."""
import ctypes, json, sys
import numpy as np

for case in json.load(open(sys.argv[1])):
    lib = ctypes.CDLL(sys.argv[2])
    sizes = (ctypes.c_int64 * 4)(case["T"], 1, 1, 1)
    arrays = [np.zeros(max(n, 1), t) for n, t in case["arrays"]]
    for a in arrays:
        a[:] = np.random.default_rng(0).integers(0, 9, a.size)
    p = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
    items = getattr(lib, case["symbol"] + "_items")
    items.restype = ctypes.c_int64
    end = items(sizes)
    getattr(lib, case["symbol"])(sizes, p, ctypes.c_int64(0), ctypes.c_int64(end))
print("clean")
'''
f32, i64 = torch.float32, torch.int64
SANITIZED = {
    "swiglu": (pointwise, lambda g, u: F.silu(g) * u, [(("T", 70), f32), (("T", 70), f32)]),
    "cat": (pointwise, lambda x: torch.cat((-x[..., 9:], x[..., :9]), -1), [(("T", 19), f32)]),
    "pad_flip": (pointwise, lambda x: F.pad(x, (3, 2)).flip(-1), [(("T", 19), f32)]),
    "columns": (pointwise, lambda x: x.t().contiguous() + 1, [(("T", 19), f32)]),
    "bf16": (pointwise, lambda x, y: x * y, [(("T", 19), torch.bfloat16), (("T", 19), f32)]),
    "gather": (pointwise, lambda i, w: w[i], [(("T",), i64), ((5, 19), f32)]),
    "whole": (pointwise, lambda a: (a // 3, a % 4), [(("T", 9), i64)]),
    "softmax": (row_reduction, lambda x: torch.softmax(x, -1), [(("T", 19), f32)]),
    "argmax": (row_reduction, lambda x: x.argmax(-1), [(("T", 19), f32)]),
    "mm": (matmul, lambda x, w: x @ w, [(("T", 19), f32), ((19, 33), f32)]),
    "mm_t": (matmul, lambda x, w: x @ w.t(), [(("T", 19), f32), ((33, 19), f32)]),
    "table": (embedding, lambda i, w: F.embedding(i, w) * 2, [(("T",), i64), ((5, 19), f32)]),
}
NUMPY = {"f32": "float32", "bf16": "uint16", "i64": "int64", "bool": "uint8"}


@pytest.mark.parametrize("target", ["host", "portable"])
def test_kernels_are_clean_under_address_and_undefined_sanitizers(
    target: str, tmp_path: Path
) -> None:
    compiler = build.find_compiler().path
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no libasan")
    sources, cases = [], []
    for emitter, function, inputs in SANITIZED.values():
        body = trace(function, *inputs)
        operands = operands_of(body)
        spec = emitter.spec_of(body, operands)
        assert spec is not None
        source = emitter.emit(spec)
        sources.append(source)
        for tokens in (1, 5):
            arrays = []
            for o in operands:
                shape = [dim_value(d, {"T": tokens}) for d in o.shape]
                strides = [dim_value(d, {"T": tokens}) for d in o.strides]
                span = 1 + sum((s - 1) * t for s, t in zip(shape, strides))
                arrays.append((span, NUMPY[o.dtype]))
            cases.append({"T": tokens, "symbol": source.symbol, "arrays": arrays})
    flags = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    chosen = build.Target.host() if target == "host" else build.Target.named("portable")
    objects = build.build_objects(sources, tmp_path, chosen, extra_flags=flags)
    shared = build.link(objects, tmp_path / "sanitized.so", chosen, extra_flags=flags)
    (tmp_path / "run.py").write_text(RUNNER)

    def run_all() -> subprocess.CompletedProcess[str]:
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        return subprocess.run(
            [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "cases.json"), str(shared)],
            capture_output=True,
            text=True,
            env={"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin:/bin"},
            check=False,
        )

    clean = run_all()
    assert clean.returncode == 0 and clean.stdout.strip() == "clean", clean.stderr[-3000:]
    span, dtype = cases[1]["arrays"][0]
    cases[1]["arrays"][0] = (span - 1, dtype)  # the control: one element too few must be found
    assert "heap-buffer-overflow" in run_all().stderr


@pytest.mark.parametrize("many_programs", [False, True])
def test_precompiled_headers_change_no_object(
    many_programs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "precompile", precompiled.precompile)  # not the run's one prelude
    text = '#include "prelude.h"\n'
    if many_programs:
        text += f'#include "{precompiled.STEP}"\nvoid run_step(aios::Worker*, const Run*) {{}}\n'
    text += 'extern "C" float twice(float x) { return 2 * x; }\n'
    folders = tmp_path / "quick", tmp_path / "slow"
    build.prepare(folders[0], build.Target.host())
    ready = {path: path.stat().st_mtime_ns for path in folders[0].glob("prelude-*/*")}
    made = []
    for folder in folders:
        made += build.build_objects(
            [("twice", text)], folder, build.Target.host(), many_programs=many_programs
        )
        monkeypatch.setattr(build, "precompile", lambda *_: [])
    found = [len(list(folder.glob("prelude-*/prelude.h.gch"))) for folder in folders]
    assert found == [len(ready) + many_programs * len(ready), 0]
    assert len(ready) == ("clang" not in build.find_compiler().version)
    assert all(path.stat().st_mtime_ns == made_at for path, made_at in ready.items())
    assert made[0].read_bytes() == made[1].read_bytes()
