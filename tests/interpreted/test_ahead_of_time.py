"""A start on a GPU takes every kernel from the artefact; nothing is compiled then or later."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests import zoo

ROOT = Path(__file__).resolve().parents[2]


# By day: launches with the pages' addresses, the lists that grow, and one of each kind of size.
SOME = ("attention", "sample", "index_select")


def started(
    tmp_path: Path, parts: tuple[str, ...], seconds: int = 0, **options: Any
) -> dict[str, Any]:
    """Return what a start with options, and steps after it, found and compiled (aot_engine.py).

    seconds: in which its clock, which finds candidates faster, may choose kernels.
    """
    shutil.copytree(zoo.make("qwen3_gqa", tmp_path, "bfloat16"), tmp_path / "model")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["AIOS_SELECT_KERNELS"] = str(seconds)
    arguments = (str(tmp_path), json.dumps(options), *parts)
    command = [sys.executable, "-m", "tests.interpreted.aot_engine", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


@pytest.mark.parametrize(
    "parts", [SOME, pytest.param((), marks=pytest.mark.nightly)], ids=["some", "all"]
)
def test_nothing_is_compiled_at_the_start_nor_after_ready(
    parts: tuple[str, ...], tmp_path: Path
) -> None:
    seen = started(tmp_path, parts)
    assert seen["at_start"] == 0 and seen["late"] == 0, seen
    assert (
        seen["kept"] >= (10 if parts else 40) and seen["graphs"] == seen["buckets"] + 2
    )  # lists that grew; the fault
    assert seen["frozen"] > 10_000 and seen["ahead"], seen
    assert seen["misaligned"] > 0, "the counter sees what is compiled after ready"


@pytest.mark.nightly
def test_what_the_clock_chose_comes_from_the_artefact(tmp_path: Path) -> None:
    """Candidates are compiled with the rest and chosen; the start runs them and compiles none."""
    seen = started(tmp_path, ("linear",), seconds=600)
    assert seen["at_start"] == 0 and seen["late"] == 0, seen
    assert seen["chosen"] > 2 and seen["candidates_run"] > 2 and len(seen["told"]) >= 10, seen
