"""The questions of docs/study.md as a stranger asks them: each one process, under a minute."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.study.questions import QUESTIONS, ROOT, command_of, largest_kernel

BYTES, NORM, SAVES, MEMORY, BROKEN = QUESTIONS
MOST_SECONDS = 60.0  # of the processor: the machine may be busy


def aios(arguments: Sequence[str], cache: Path, package: Path = ROOT, code: int = 0) -> str:
    """Run a command with a package, from the folder that has it and the examples."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(package), "AIOS_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "aios_compile.cli.main", *arguments],
        cwd=package, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stdout + done.stderr
    assert after.ru_utime - before.ru_utime < MOST_SECONDS, arguments
    return done.stdout


@pytest.mark.parametrize("question", [BYTES, NORM, MEMORY])
def test_the_doctors_answers_take_less_than_a_minute(question: str, tmp_path: Path) -> None:
    assert "rms_norm" in aios(command_of(question), tmp_path)


def test_the_kernels_of_the_compiled_model_are_those_of_the_doctor(tmp_path: Path) -> None:
    name, line = largest_kernel(aios(command_of(BYTES), tmp_path))
    table = aios(["kernels", "examples/shakespeare"], tmp_path).splitlines()
    assert name in table[1] and line in table[1]


def test_what_each_pass_saves(tmp_path: Path) -> None:
    found = aios(command_of(SAVES), tmp_path)
    launches = {
        row[1]: int(row[2])
        for row in re.finditer(r"^(\(all passes\)|\w+) +(\d+) +\d+", found, re.M)
    }
    whole = launches.pop("(all passes)")
    assert launches["merge_qkv"] == whole + 2 and launches["merge_gate_up"] > whole
    assert launches["raise_rope"] > whole and launches["fuse_linear_epilogue"] > whole


def test_which_pass_broke_the_model(tmp_path: Path) -> None:
    """The mistake that the document names, planted in a copy of the package."""
    shutil.copytree(ROOT / "aios_compile", tmp_path / "aios_compile")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    broken = tmp_path / "aios_compile" / "passes" / "raise_rms_norm.py"
    head, rewrite, body = broken.read_text().partition("def _rewrite(")
    assert body.count("weight, eps, in_float32") >= 1
    changed = body.replace("(x, weight, eps, in_float32)", "(x, weight, eps * 10, in_float32)")
    assert changed != body
    broken.write_text(head + rewrite + changed)
    found = aios(command_of(BROKEN), tmp_path / "cache", tmp_path, code=1)
    assert re.search(r"^first wrong pass +raise_rms_norm$", found, re.M)
    assert re.search(r"^first wrong node +rms_norm\w* = aios\.rms_norm", found, re.M)
    assert re.search(r"^model line +decoder\.py:\d+ in forward", found, re.M)
