"""A planted bug is found, shrunk to a few lines, and written as a script that shows it."""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.runner import Stage
from aios_compile.study.fuzz import example
from aios_compile.study.fuzz.campaign import run_campaign
from aios_compile.study.fuzz.compile_graph import compile_graph
from tests.planted import fuse_plants, raise_plants, rewrite_plants
from tests.planted.plants import PLANTS

assert all((fuse_plants, raise_plants, rewrite_plants)), "they register themselves"
ROOT = Path(__file__).resolve().parents[2]


def spoiled(name: str, module: Any, sizes: Any, stages: Any, **options: Any) -> Any:
    """Compile with a mistake planted in one pass."""
    plant = next(p for p in PLANTS if p.name == name)

    def change(stage: Stage) -> Stage:
        passes = [
            plant.apply_to(p) if info_of(p).name == plant.pass_name else p for p in stage.passes
        ]
        return replace(stage, passes=tuple(passes))

    return compile_graph(module, sizes, [change(s) for s in stages], **options)


def test_a_planted_bug_becomes_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = functools.partial(spoiled, "halves_swapped")
    tally = run_campaign(
        range(20),
        seed=0,
        objects=tmp_path / "objects",
        scripts=tmp_path,
        passes=("raise_rope",),
        compiler=compiler,
        max_failures=1,
        max_trials=20,
    )
    (failure,) = tally.failures
    assert failure.message.startswith("wrong: output")
    text = Path(failure.script).read_text()
    assert text.count(" = torch.") + text.count(" = aios.") + text.count(" = aten.") <= 14
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(example, "compile_graph", compiler)
        runpy.run_path(failure.script, run_name="__main__")
    assert ended.value.code == 1
    capfd.readouterr()
    assert not run_script(failure.script), "the compiler as it is"
    assert "right: the error is" in capfd.readouterr().out


def run_script(path: str) -> int:
    """Run a script as its reader does; `make test` starts no process for it, to import nothing."""
    if "NIGHTLY" in os.environ:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, path], cwd=ROOT, env=environment).returncode
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    return int(ended.value.code or 0)


def test_a_crash_of_the_compiler_is_a_failure(tmp_path: Path) -> None:
    def crashes(*args: Any, **options: Any) -> Any:
        raise KeyError("tokens")

    tally = run_campaign(
        range(3), seed=0, objects=tmp_path, scripts=tmp_path, compiler=crashes, max_failures=1
    )
    assert [f.message for f in tally.failures] == ["crash: KeyError: 'tokens'"]


def test_a_reverted_pass_is_a_failure(tmp_path: Path) -> None:
    """The runner reverts an optional pass that crashes: here that must not be silent."""

    def broken(module: Any, sizes: Any, stages: Any, **options: Any) -> Any:
        def raise_rope(graph: Any, context: Any) -> int:
            raise ValueError("no rotation")

        def change(function: Any) -> Any:
            if info_of(function).name != "raise_rope":
                return function
            raise_rope.info = info_of(function)  # type: ignore[attr-defined]
            return raise_rope

        stages = [replace(s, passes=tuple(map(change, s.passes))) for s in stages]
        return compile_graph(module, sizes, stages, **options)

    tally = run_campaign(
        range(8), seed=0, objects=tmp_path, scripts=tmp_path, passes=("raise_rope",),
        compiler=broken, max_failures=1, max_trials=10,
    )  # fmt: skip
    assert tally.failures[0].message == "reverted: raise_rope: ValueError: no rotation"


def test_a_second_opinion_excuses_rounding_and_nothing_else() -> None:
    """x - x, rounded: eager is exact by luck. A wrong value stays wrong."""
    from aios_compile.study.fuzz.judge import run_eager, second_opinion
    from aios_compile.study.fuzz.trace_function import trace

    def f(x: Any) -> Any:
        return torch.sub(torch.mul(x, 3.0), torch.mul(x, 3.0)), torch.tanh(x)

    f.__annotations__["x"] = "f32[T, 8]"
    module = trace(f)
    x = torch.randn(5, 8)
    oracle = run_eager(module, {"x": x}, torch.float64)
    cancelled, smooth = second_opinion(module, {"x": x}, oracle)
    assert cancelled > 1e-8 and smooth < 1e-6
