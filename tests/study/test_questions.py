"""A stranger's questions, answered by the commands that docs/study.md gives, as it gives them.

What compiles or plans many programs is in tests/nightly/test_questions.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from aios_compile.cli.main import app
from aios_compile.study import bandwidth, doctor
from tests.study.questions import QUESTIONS, ROOT, command_of, largest_kernel

BYTES, NORM, SAVES, MEMORY, BROKEN = QUESTIONS


@pytest.fixture(scope="module")
def _once() -> Iterator[None]:
    """Examine the model once for all questions, and take the memory's speed as known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        examine = functools.cache(doctor.examine)
        patch.setattr(doctor, "examine", examine)
        patch.setattr(bandwidth, "read_bandwidth", lambda threads, repeats: 3e10)
        yield


def answer(question: str) -> str:
    done = CliRunner().invoke(app, command_of(question))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.usefixtures("_once")
def test_which_kernel_reads_most() -> None:
    name, line = largest_kernel(answer(BYTES))
    assert "linear_gated_activation" in name, "gate and up are the largest weights"
    assert line.startswith("decoder.py:") and "gate_proj" in line


@pytest.mark.usefixtures("_once")
def test_why_a_norm_was_not_fused() -> None:
    lines = answer(NORM).splitlines()
    at = next(i for i, x in enumerate(lines) if x.startswith("rms_norm of model.layers.*.input_"))
    assert lines[at].endswith(", alone") and "summed outside of the layer" in lines[at + 1]
    assert any(re.match(r"rms_norm of .*post_.*: in add_rms_norm_\w+, with add", x) for x in lines)


@pytest.mark.usefixtures("_once")
def test_what_happens_to_memory_when_t_doubles() -> None:
    found = answer(MEMORY)
    one, two = map(int, re.findall(r"T = (\d+)", found))
    weights = re.search(r"^  weights +(\S+ \S+) +(\S+ \S+)$", found, re.M)
    arena = re.search(r"^  arena .* +([\d.]+) MiB +([\d.]+) MiB$", found, re.M)
    assert two == 2 * one and weights and weights[1] == weights[2]
    assert arena and float(arena[2]) == pytest.approx(2 * float(arena[1]), rel=0.05)


def test_all_questions_have_a_command() -> None:
    commands = [command_of(q) for q in QUESTIONS]
    assert [c[0] for c in commands] == ["doctor", "doctor", "doctor", "doctor", "bisect"]
    assert "--savings" in command_of(SAVES) and "--prompt" in command_of(BROKEN)
